"""From a path to a model that can be evaluated, on a device: our own checkpoints and any Hugging Face causal language model on disk.

adapter = load_adapter("runs/quickstart", "cpu")            # or a folder for transformers.AutoModelForCausalLM
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import coder_of
from evals.adapters.base import Adapter, first_words
from evals.adapters.hf import HFAdapter, hf_coder
from evals.adapters.own import OwnAdapter
from evals.adapters.trust import may_run_code
from models.hub.weights import Weights
from training.errors import UserError
from training.launch import launch


def load_adapter(
    path: str, device: str | torch.device = "cpu", precision: str = "fp32", gguf: str | None = None, trust_remote_code: bool = False
) -> Adapter:
    """The model behind `path`, on `device`. Raises UserError in one sentence.

    Ours is a run, a checkpoint of it, or a folder of model.safetensors with our config.json; anything else goes to transformers. precision: fp32
    or bf16. gguf: name of a GGUF file in the folder. trust_remote_code: code that lies in the folder may be run; without it only code that this
    version writes itself.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"There is no {folder}; give a run folder, a checkpoint folder, or a folder of a Hugging Face causal language model."
        )
    if is_ours(folder):
        from models.checkpoint import load_model

        model, tokenizer, meta = load_model(folder, device)
        ours = OwnAdapter(model, coder_of(tokenizer, meta["folder"]), folder.name or str(folder), meta["folder"], precision)
        ours.train_length = (meta.get("run", {}).get("train") or {}).get("seq_len")
        return ours
    return _load_foreign(folder, device, precision, gguf, trust_remote_code)


def _load_foreign(folder: Path, device: str | torch.device, precision: str, gguf: str | None, trust_remote_code: bool) -> HFAdapter:
    if not (folder / "config.json").exists() and gguf is None:
        raise UserError(f"{folder} holds no config.json; give a run folder or a folder of a Hugging Face causal language model.")
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError("This is no checkpoint of ours, and transformers is not installed: pip install transformers.") from error
    quiet_transformers()
    if gguf is None:
        Weights(folder)  # refuses pickles, and an index that leads out of the folder
    trusted = may_run_code(folder, trust_remote_code)
    try:
        options: dict[str, Any] = {"gguf_file": gguf} if gguf else {"use_safetensors": True}
        hf: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=trusted, **options)
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded by transformers: {first_words(error)}") from error
    foreign = HFAdapter(hf.to(device), hf_coder(str(folder), trusted), folder.name, str(folder), precision)
    foreign.trusted = trusted
    limit = getattr(hf.config, "max_position_embeddings", None)
    foreign.train_length = int(limit) if isinstance(limit, int) else None
    return foreign


def is_ours(folder: Path) -> bool:
    """Whether `folder` is a run, a checkpoint, or a folder whose config.json is a ModelConfig."""
    if (folder / "checkpoints").is_dir():
        return True
    try:
        return "mixers" in (config := json.loads((folder / "config.json").read_text())) and "model_type" not in config
    except (OSError, ValueError):
        return False


def device_of(name: str) -> torch.device:
    """auto, cpu or cuda as a device of this process: under a launcher a GPU of its own. Raises UserError."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}; choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no GPU; give device=cpu.")
    return torch.device("cuda", launch().local) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def quiet_transformers() -> None:
    """Turns off transformers' progress bars and its hints about other packages, which would tear the lines of an evaluation apart."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
