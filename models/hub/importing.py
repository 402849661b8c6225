"""Stock Llama-shaped and Mamba-2 folders, and this project's exported ones, as checkpoints of this project.

    python -m models.hub.importing FOLDER OUT       # OUT: a checkpoint for evaluation, generation and export
    python train.py model=hf:FOLDER ...             # training goes on from its weights

Nothing is unpickled and no code of the folder is run. What a stock config says that our models do not have is refused by name.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig
from models.hub.custom import custom
from models.hub.native import QK_NORM_EPS, Stock, stock
from models.hub.weights import Weights, read_object, write_shards
from models.lm import LanguageModel
from training.errors import UserError

LLAMA_SHAPED = ("llama", "mistral", "qwen3")
KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")  # for the export back
FACTS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def is_foreign(folder: Path) -> bool:
    """Whether the folder's config.json is transformers' (it names a model_type), not a ModelConfig."""
    return (folder / "config.json").is_file() and "model_type" in read_object(folder / "config.json")


def _need(values: dict[str, Any], folder: Path, wanted: dict[str, Any]) -> None:
    """Raises UserError for the first key that is there with another value than the only one we have."""
    for key, only in wanted.items():
        if values.get(key, only) != only:
            raise UserError(f"{folder} cannot be imported: its {key} is {values[key]!r}, and only {only!r} is supported.")


def read_stock_config(folder: Path) -> ModelConfig:
    """The ModelConfig that computes what the stock class of this folder does. Raises UserError."""
    values = read_object(folder / "config.json")
    kind = values.get("model_type")
    try:
        if kind in LLAMA_SHAPED:
            config = _llama(values, folder)
        elif kind == "mamba2":
            config = _mamba2(values, folder)
        elif kind == "bamba":
            config = _bamba(values, folder)
        elif kind == "everywhen":
            config = _own(values)
        else:
            raise UserError(f"{folder} is a {kind} model; these can be imported: {', '.join((*LLAMA_SHAPED, 'mamba2', 'bamba', 'everywhen'))}.")
        return ModelConfig.from_dict(config)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} does not say {error.args[0]!r}; export or fetch the folder again.") from error
    except UserError:
        raise
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'} is not a model: {error}") from error


def _llama(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    _need(values, folder, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    kind = rope.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default" or float(rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) != 1.0:
        raise UserError(f"{folder} cannot be imported: its rotary positions are scaled or partial ({kind}), and only plain ones are supported.")
    eps = float(values.get("rms_norm_eps", 1e-6))
    qwen = values["model_type"] == "qwen3"
    if qwen and (eps != QK_NORM_EPS or values.get("use_sliding_window")):
        raise UserError(f"{folder} cannot be imported: with QK-norm, rms_norm_eps must be {QK_NORM_EPS:g} and no window be used.")
    heads = values["num_attention_heads"]
    mixer = {
        "type": "attention",
        "n_heads": heads,
        "n_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or (128 if qwen else values["hidden_size"] // heads),
        "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        "window": (values.get("sliding_window") or 0) if values["model_type"] == "mistral" else 0,
        "qk_norm": qwen,
    }
    return {**_common(values, eps), "d_ff": values["intermediate_size"], "pattern": ["attention"], "mixers": {"attention": mixer}}


def _mamba2(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    _need(values, folder, {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True})
    eps = float(values.get("layer_norm_epsilon", 1e-5))
    low, high = (float(v) if not isinstance(v, dict) else math.inf for v in values.get("time_step_limit", (0.0, math.inf)))
    mixer = {
        "type": "mamba2",
        "d_state": values["state_size"],
        "expand": values.get("expand", 2),
        "head_dim": values["head_dim"],
        "n_groups": values["n_groups"],
        "d_conv": values.get("conv_kernel", 4),
        "chunk": values.get("chunk_size", 256),
        "dt_limit_min": low,
        "dt_limit_max": 0.0 if math.isinf(high) else high,
        "norm_eps": eps,
    }
    return {**_common(values, eps), "d_ff": 0, "pattern": ["mamba2"], "mixers": {"mamba2": mixer}}


def _bamba(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    _need(values, folder, {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "mamba_conv_bias": True, "mamba_proj_bias": False})
    rope = values.get("rope_parameters") or {}
    scaled = rope.get("rope_type") or (values.get("rope_scaling") or {}).get("type") or "default"
    if scaled != "default" or float(rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 0.5))) != 1.0:
        raise UserError(f"{folder} cannot be imported: its rotary positions are scaled or partial ({scaled}), and only plain ones are supported.")
    heads, where = values["num_attention_heads"], set(values.get("attn_layer_indices") or [])
    low, high = (float(v) if not isinstance(v, dict) else math.inf for v in values.get("time_step_limit") or (0.0, math.inf))
    if low or not math.isinf(high):
        raise UserError(f"{folder} cannot be imported: its time_step_limit is not that of the class.")
    eps = float(values.get("rms_norm_eps", 1e-5))
    attention = {"type": "attention", "n_heads": heads, "n_kv_heads": values.get("num_key_value_heads") or heads, "rope_theta": float(rope.get("rope_theta", 10000.0))}
    mamba = {
        "type": "mamba2",
        "d_state": values["mamba_d_state"],
        "expand": values["mamba_expand"],
        "head_dim": values["mamba_expand"] * values["hidden_size"] // values["mamba_n_heads"],
        "n_groups": values["mamba_n_groups"],
        "d_conv": values["mamba_d_conv"],
        "chunk": values.get("mamba_chunk_size", 256),
        "norm_eps": eps,
    }
    pattern = ["attention" if i in where else "mamba2" for i in range(values["num_hidden_layers"])]
    known = {name: mixer for name, mixer in (("attention", attention), ("mamba2", mamba)) if name in pattern}
    return {**_common(values, eps), "d_ff": values["intermediate_size"], "pattern": pattern, "mixers": known}


def _own(values: dict[str, Any]) -> dict[str, Any]:
    extra = {"d_ff": values["intermediate_size"], "pattern": values["pattern"], "mixers": values["mixers"]}
    return {**_common(values, float(values["rms_norm_eps"])), **extra, "learnable_residual": values["learnable_residual"]}


def _common(values: dict[str, Any], eps: float) -> dict[str, Any]:
    return {
        "vocab_size": values["vocab_size"],
        "d_model": values["hidden_size"],
        "n_layers": values["num_hidden_layers"],
        "norm_eps": eps,
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "init_std": float(values.get("initializer_range", 0.02)),
    }


def read_stock(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, fp32 weights by our names) of a stock or exported folder. Raises UserError for missing, surplus or misshapen tensors."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a Llama-shaped, Mamba-2 or exported model.")
    config, weights = read_stock_config(folder), Weights(folder)
    own = read_object(folder / "config.json")["model_type"] == "everywhen"
    target, why = (custom(config, 1), "") if own else stock(config)
    if target is None and config.pattern == ["mamba2"]:
        target = _limited(config)
    if target is None:
        raise UserError(f"{folder} cannot be imported: {why}.")
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LanguageModel(config).state_dict().items()}
    if config.tie_embeddings:
        shapes.pop("head.weight")
    found: dict[str, Tensor] = {}
    surplus = set(weights.names()) - {"lm_head.weight" if config.tie_embeddings else ""}
    for ours, shape in shapes.items():
        theirs = target.name(ours)
        if theirs not in weights.where:
            raise UserError(f"{folder} lacks the tensor {theirs}; fetch or export the folder again.")
        tensor = weights.tensor(theirs).to(torch.float32)
        tensor = tensor[:, 0] if theirs.endswith("conv1d.weight") and tensor.ndim == 3 else tensor
        if tuple(tensor.shape) != shape:
            raise UserError(f"{folder}: the tensor {theirs} has shape {tuple(tensor.shape)} where config.json makes it {shape}.")
        found[ours] = tensor.contiguous()
        surplus.discard(theirs)
    if surplus:
        raise UserError(f"{folder} holds {len(surplus)} tensor(s) that its config.json has no place for, the first is {min(surplus)}.")
    return config, found


def _limited(config: ModelConfig) -> Stock | None:
    """The names of a Mamba-2 with limited step sizes, which we do not export as a stock class but can read."""
    mixer = {k: v for k, v in config.mixers["mamba2"].items() if not k.startswith("dt_limit")}
    return stock(ModelConfig.from_dict({**config.to_dict(), "mixers": {"mamba2": mixer}}))[0]


ARCHITECTURE = ("vocab_size", "d_model", "n_layers", "norm_eps", "tie_embeddings", "d_ff", "pattern", "mixers", "learnable_residual")


def resolved(mapping: dict[str, Any]) -> dict[str, Any]:
    """A model section whose `init_from` names a folder: the architecture is the folder's, the rest (z_loss, head_chunk, ...) stays."""
    mapping = dict(mapping)
    folder = mapping.pop("init_from", None)
    if not folder:
        return mapping
    if (Path(str(folder)) / "checkpoints").is_dir() or (Path(str(folder)) / "COMPLETE.json").is_file():
        raise UserError(f"{folder} is a run or checkpoint of this program; begin from it with train.start_from={folder} and the model= and size= it has.")
    if not (Path(str(folder)) / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give model=hf: the folder of a Llama-shaped, Mamba-2 or exported model.")
    found = read_stock_config(Path(str(folder))).to_dict()
    return {**mapping, **{key: found[key] for key in ARCHITECTURE}}


def load_into(folder: str | Path, model: LanguageModel, tokenizer: Any = None) -> None:
    """The folder's weights into `model`. tokenizer: of the data; raises UserError when the folder's has another vocabulary."""
    _, tensors = read_stock(folder)
    path = Path(folder) / "tokenizer.json"
    if tokenizer is not None and path.is_file():
        from tokenizers import Tokenizer

        if Tokenizer.from_file(str(path)).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{folder} has another tokenizer than the data; prepare the data with tokenizer={path}.")
    model.load_state_dict(tensors, strict=False)


def facts_of(folder: Path) -> dict[str, Any]:
    """What config.json says beside the architecture, which an export of the imported checkpoint says again."""
    values = read_object(folder / "config.json")
    return {key: values[key] for key in FACTS if values.get(key) is not None}


def end_ids(folder: Path) -> list[int]:
    """The ids that end a text by the folder's generation_config.json or config.json; none where these say nothing."""
    for name in ("generation_config.json", "config.json"):
        found = read_object(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids = [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]
        if ids:
            return ids
    return []


def import_folder(folder: str | Path, out: str | Path) -> Path:
    """Writes a checkpoint (model.safetensors in fp32, config.json, imported.json, and the folder's tokenizer and generation settings) under a
    temporary name, then renames it to `out`."""
    from training.files import write_json

    folder, final = Path(folder), Path(out)
    if final.exists():
        raise UserError(f"{final} exists already; remove it or give another folder.")
    config, tensors = read_stock(folder)
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_shards(temporary, {n: t.nbytes for n, t in tensors.items()}, tensors.__getitem__, 1 << 62)
        write_json(temporary / "config.json", config.to_dict())
        write_json(temporary / "imported.json", facts_of(folder))
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out")
    values = parser.parse_args(arguments)
    try:
        print(f"wrote {import_folder(values.folder, values.out)}")
    except UserError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
