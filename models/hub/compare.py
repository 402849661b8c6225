"""Whether a stock folder computes here what it computes in transformers: logits of both on random tokens.

Both models run in fp32 on the CPU. Besides whole texts they read a short text whose second half has far higher positions, which shows a
difference in scaled rotary positions without the cost of a long text. A window too long to be tested is shortened in both models.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from models.config import ModelConfig
from models.hub.stock_config import first_line, quiet, their_config
from models.lm import LanguageModel, LMState

SHORT, PIECE, NARROW = 64, 20, 12  # tokens of the shortest text and of a piece, and a window made short
WORK = 2e12  # multiply-adds of one forward pass beyond which a text is too long to be tried
RELATIVE = 1e-4  # of the largest logit; rounding beyond it is measured
HELP = "or leave the comparison out: python -m scripts.import_checkpoint FOLDER OUT verify=false, for training model.verify=false"


def compare(folder: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Raises UserError if the logits differ, if transformers cannot run the folder, or if there is no memory for it."""
    _check_memory(folder, tensors)
    mixers = [config.mixers[config.mixer_name(i)] for i in range(config.n_layers)]
    parameters = sum(t.numel() for t in tensors.values())
    said = their_config(folder)  # as transformers reads it: our reading is under test and must not choose the lengths
    scaling = getattr(said, "rope_parameters", None) or {}
    window = max(getattr(said, "sliding_window", None) or 0, *(int(m.get("window", 0)) for m in mixers))
    dynamic = scaling.get("rope_type") == "dynamic"
    border = int(said.max_position_embeddings if dynamic else scaling.get("original_max_position_embeddings") or 0)
    narrow = {
        "window": window > NARROW and not _affordable(parameters, config, window + PIECE),
        "dynamic": dynamic and border > NARROW and not _affordable(parameters, config, border + PIECE),
    }
    theirs, ours = _their_model(folder, said, narrow), _our_model(config, tensors, narrow)
    lengths = [SHORT, *(n + PIECE for n in (window, border) if n and _affordable(parameters, config, n + PIECE))]
    kind = type(theirs).__name__
    for length in sorted(set(lengths)):
        ids = torch.randint(0, config.vocab_size, (2 if length == SHORT else 1, length), generator=torch.Generator().manual_seed(length))
        our_logits, their_logits, rounding = _both(folder, ours, theirs, ids)
        _agree(folder, kind, our_logits, their_logits, rounding, f"{length} tokens")
    # Dynamic scaling depends on the length of a call, so that a gap of positions would change it.
    if not dynamic and any(m.get("type") == "attention" and m.get("rope", True) for m in mixers):
        limit = int(getattr(theirs.config, "max_position_embeddings", 0) or 0)
        far = max(limit - PIECE, border + border // 2, 4 * SHORT)
        ids = torch.randint(0, config.vocab_size, (1, 2 * PIECE), generator=torch.Generator().manual_seed(0))
        our_logits, their_logits = _apart(folder, ours, theirs, ids, far)
        _agree(folder, kind, our_logits, their_logits, 0.0, f"positions up to {far + PIECE}")


def _affordable(parameters: int, config: ModelConfig, length: int) -> bool:
    return length * (parameters + config.n_layers * config.d_model * length) <= WORK and length * config.vocab_size <= 1 << 28


def _check_memory(folder: Path, tensors: dict[str, Tensor]) -> None:
    # The weights of their model; ours shares the tensors that are loaded already.
    needed_bytes = 1.3 * sum(t.nbytes for t in tensors.values())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return
    if needed_bytes > free:
        raise UserError(
            f"To compare {folder} with transformers takes {needed_bytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; free some, {HELP}."
        )


def _their_model(folder: Path, config: Any, narrow: dict[str, bool]) -> Any:
    from transformers import AutoModelForCausalLM

    if narrow["window"]:
        config.sliding_window = NARROW
    if narrow["dynamic"]:
        config.max_position_embeddings = NARROW
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            options = {"dtype": torch.float32, "trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
            return AutoModelForCausalLM.from_pretrained(str(folder), config=config, **options).eval()
    except Exception as error:  # its classes raise their own kinds
        raise UserError(f"transformers does not load {folder}, so there is nothing to compare it with: {first_line(error)}") from error


def _our_model(config: ModelConfig, tensors: dict[str, Tensor], narrow: dict[str, bool]) -> LanguageModel:
    changed = {}
    for name, mixer in config.mixers.items():
        changed[name] = dict(mixer)
        if narrow["window"] and mixer.get("window"):
            changed[name]["window"] = NARROW
        if narrow["dynamic"] and mixer.get("rope_scaling"):
            changed[name]["rope_scaling"] = {**mixer["rope_scaling"], "original_max_position_embeddings": NARROW}
    config = ModelConfig.from_dict({**config.to_dict(), "mixers": changed})
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def _run(folder: Path, forward: Callable[[], Tensor]) -> Tensor:
    try:
        with quiet(), torch.no_grad():
            return forward()
    except Exception as error:
        raise UserError(f"transformers does not run {folder}, so there is nothing to compare it with: {first_line(error)}") from error


def _both(folder: Path, ours: LanguageModel, theirs: Any, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """(our logits, theirs, rounding): rounding is how far their logits of the first row change when that row is read alone."""
    their_logits = _run(folder, lambda: theirs(input_ids=ids, use_cache=False).logits.float())
    rounding = 0.0
    if ids.shape[0] > 1:
        rounding = float((_run(folder, lambda: theirs(input_ids=ids[:1], use_cache=False).logits.float()) - their_logits[:1]).abs().max())
    with torch.no_grad():
        our_logits = ours(ids).logits
    assert our_logits is not None
    return our_logits, their_logits, rounding


def _apart(folder: Path, ours: LanguageModel, theirs: Any, ids: Tensor, far: int) -> tuple[Tensor, Tensor]:
    """Logits of both where the second half of the tokens begins at position `far`."""
    half = ids.shape[1] // 2
    positions = torch.cat([torch.arange(half), torch.arange(far, far + half)])[None]
    mask = torch.ones_like(ids)  # says that it is one text in spite of the gap
    their_logits = _run(folder, lambda: theirs(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.float())
    with torch.no_grad():
        first = ours(ids[:, :half], state=ours.init_state(1))
        assert first.state is not None
        moved = LMState([block.mixer.at_position(part, far) for block, part in zip(ours.blocks, first.state.layers)])
        second = ours(ids[:, half:], state=moved)
    assert first.logits is not None and second.logits is not None
    return torch.cat([first.logits, second.logits], 1), their_logits


def _agree(folder: Path, kind: str, our_logits: Tensor, their_logits: Tensor, rounding: float, where: str) -> None:
    if not bool(their_logits.isfinite().all()):
        raise UserError(
            f"{folder} cannot be imported: its logits are not finite in transformers either, so its weights are damaged; fetch it again."
        )
    worst, largest = float((our_logits - their_logits).abs().max()), float(their_logits.abs().max())
    if not worst <= max(RELATIVE * largest, 30 * rounding, 1e-6):
        raise UserError(
            f"{folder} cannot be imported: with {where} our logits differ from those of {kind} of transformers {version('transformers')} by "
            f"{worst:.2g} (the largest is {largest:.2g}), so its config.json says something that is not understood here, or not by that release."
        )
