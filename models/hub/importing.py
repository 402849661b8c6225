"""Stock Llama-shaped and Mamba-2 folders, and this project's exported ones, as checkpoints of this project.

scripts/import_checkpoint.py writes a checkpoint for evaluation, generation and export; training goes on from the weights of a folder with
model=hf:FOLDER. Nothing is unpickled and no code of the folder is run. What a stock config says that our models do not have is refused by name, and logits that
are not those of transformers' own class are refused too, unless verify=false leaves that comparison out (it takes the model twice in memory, in fp32).
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from data.files import check_absent, new_folder, write_json
from kernels.moved import moved
from models.config import ModelConfig
from models.hub.custom import custom
from models.hub.native import BAMBA_RULES, LLAMA_RULES, MAMBA2_RULES
from models.hub.native_delta import OLMO_ALIASES, QWEN_RULES, olmo_cuts, olmo_rules, qwen_cuts
from models.hub.stock import Stock
from models.hub.stock_config import read_stock_config, their_config
from models.hub.weights import Weights, read_object, write_shards
from models.lm import LanguageModel

KEPT = (  # for the export back
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
NO_TEXT = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")  # tokenizers in forms that we do not read
FACTS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
IGNORED = re.compile(r".*rotary_emb\.inv_freq")  # a buffer of older folders, which follows from config.json


def is_foreign(folder: Path) -> bool:
    """Whether the folder's config.json is transformers' (it names a model_type), not a ModelConfig."""
    return (folder / "config.json").is_file() and "model_type" in read_object(folder / "config.json")


def read_stock(folder: str | Path, verify: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(config, fp32 weights by our names) of a stock or exported folder. Raises UserError for missing, surplus or misshapen tensors, and for
    a stock folder whose logits are not ours (models/hub/compare.py), unless verify is False."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a Llama-shaped, Mamba-2 or exported model.")
    config, weights = read_stock_config(folder), Weights(folder)
    exported = read_object(folder / "config.json")["model_type"] == "everywhen"
    tensors = _tensors(folder, config, weights, names_of(folder, config))
    if verify and not exported:
        from models.hub.compare import compare

        compare(folder, config, tensors)
    return config, tensors


def names_of(folder: Path, config: ModelConfig) -> Stock:
    """How the folder names our parameters. Raises UserError if its class is none that we know names of."""
    kind = read_object(folder / "config.json")["model_type"]
    if kind == "everywhen":
        return custom(config, 1)
    if kind in ("qwen3_5_text", "olmo_hybrid"):
        values = their_config(folder).to_dict()
        if kind == "qwen3_5_text":
            return Stock(kind, values, QWEN_RULES, qwen_cuts(values))
        return Stock(kind, values, olmo_rules(values), olmo_cuts(values, _convolutions(Weights(folder))), OLMO_ALIASES)
    rules = {"mamba2": MAMBA2_RULES, "bamba": BAMBA_RULES}.get(kind, LLAMA_RULES)
    return Stock(kind, {}, rules)


def _convolutions(weights: Weights) -> list[int] | None:
    """Rows of the three parts that OLMo Hybrid's first convolution has in the file, or None where they are not there."""
    first = next((name for name in weights.names() if name.endswith("linear_attn.q_conv1d.weight")), "")
    names = [first.replace("q_conv1d", f"{kind}_conv1d") for kind in "qkv"]
    return [weights.shape(name)[0] for name in names] if all(name in weights.where for name in names) else None


def _tensors(folder: Path, config: ModelConfig, weights: Weights, names: Stock) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LanguageModel(config).state_dict().items()}
    if config.tie_embeddings:
        shapes.pop("head.weight")
    tensors: dict[str, Tensor] = {}
    surplus = {name for name in weights.names() if not IGNORED.fullmatch(name)}
    for theirs, parts in names.tensors({name: shape[0] for name, shape in shapes.items()}).items():
        stored = held_name(names, weights, theirs)
        if not stored:
            raise UserError(f"{folder} lacks the tensor {theirs}; fetch or export the folder again.")
        if not (dtype := weights.dtype(stored)).startswith(("float", "bfloat")):
            raise UserError(f"{folder}: the tensor {stored} is of {dtype}, so the weights are quantised; fetch the original ones.")
        tensor = weights.tensor(stored)
        tensor = tensor[:, 0] if stored.endswith("conv1d.weight") and tensor.ndim == 3 else tensor
        shape = (sum(rows for *_, rows in parts), *shapes[parts[0][1]][1:])
        if tuple(tensor.shape) != shape:
            raise UserError(f"{folder}: the tensor {stored} has shape {tuple(tensor.shape)} where config.json makes it {shape}.")
        for at, ours, first, rows in parts:
            if rows == shapes[ours][0]:
                tensors[ours] = tensor[at : at + rows].to(torch.float32).contiguous()
                continue
            whole = tensors.setdefault(ours, torch.empty(shapes[ours]))
            whole[first : first + rows] = tensor[at : at + rows]
        surplus.discard(stored)
    tensors = {name: tensors[name] for name in shapes}
    head = names.name("head.weight")
    if config.tie_embeddings and head in surplus:
        if not torch.equal(weights.tensor(head).to(torch.float32), tensors["embedding.weight"]):
            raise UserError(
                f"{folder} holds a {head} of its own while its config.json ties it to the embedding; set tie_word_embeddings to false "
                f"in config.json if the file's is meant, or remove it from the file."
            )
        surplus.discard(head)
    if surplus:
        raise UserError(f"{folder} holds {len(surplus)} tensor(s) that its config.json has no place for, the first is {min(surplus)}.")
    return tensors


def held_name(names: Stock, weights: Weights, theirs: str) -> str:
    """The name that the file has for one of its tensors, or ''."""
    return next((name for name in names.known_as(theirs) if name in weights.where), "")


ARCHITECTURE = (
    "vocab_size",
    "d_model",
    "n_layers",
    "norm_eps",
    "tie_embeddings",
    "d_ff",
    "pattern",
    "mixers",
    "learnable_residual",
    "centred_norms",
    "norm_after",
)


def resolved(mapping: dict[str, Any]) -> dict[str, Any]:
    """A model section whose `init_from` names a folder: the architecture is the folder's, the rest (z_loss, head_chunk, ...) stays."""
    mapping = dict(mapping)
    folder, verify = mapping.pop("init_from", None), mapping.pop("verify", True)
    if not isinstance(verify, bool):
        raise UserError(f"model.verify must be true or false, not {verify!r}.")
    if not folder:
        return mapping
    if (Path(str(folder)) / "checkpoints").is_dir() or (Path(str(folder)) / "COMPLETE.json").is_file():
        raise UserError(
            f"{folder} is a run or checkpoint of this program; begin from it with train.start_from={folder} and the model= and size= it has."
        )
    if not (Path(str(folder)) / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; give model=hf: the folder of a Llama-shaped, Mamba-2 or exported model.")
    theirs = read_stock_config(Path(str(folder))).to_dict()
    if mapping.get("channel", theirs["channel"]) != theirs["channel"]:
        raise UserError(f"model.init_from={folder} brings the weights of a plain MLP; leave model.channel at {theirs['channel']['type']}.")
    return {**mapping, "depth": theirs.get("depth", {}), **{key: theirs[key] for key in ARCHITECTURE}}


def load_into(folder: str | Path, model: LanguageModel, tokenizer: Any = None, verify: bool = True) -> None:
    """The folder's weights into `model`. tokenizer: of the data; raises UserError when the folder's has another vocabulary."""
    _, tensors = read_stock(folder, verify)
    path = Path(folder) / "tokenizer.json"
    if tokenizer is not None and path.is_file():
        from tokenizers import Tokenizer

        if Tokenizer.from_file(str(path)).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{folder} has another tokenizer than the data; prepare the data with tokenizer={path}.")
    model.load_state_dict(tensors, strict=False)


def facts_of(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """What an export of the imported checkpoint says again: what config.json says beside the architecture, and the dtype of the tensors (that of
    most elements, and those of others by our names)."""
    values, weights, names = read_object(folder / "config.json"), Weights(folder), names_of(folder, config)
    with torch.device("meta"):
        sizes = {n: t.numel() for n, t in LanguageModel(config).state_dict().items() if held_name(names, weights, names.name(n))}
    dtypes = {name: weights.dtype(held_name(names, weights, names.name(name))) for name in sizes}
    counts: dict[str, int] = {}
    for name, dtype in dtypes.items():
        counts[dtype] = counts.get(dtype, 0) + sizes[name]
    main = max(counts, key=lambda dtype: counts[dtype])
    others = {name: dtype for name, dtype in dtypes.items() if dtype != main}
    return {
        **{key: values[key] for key in FACTS if values.get(key) is not None},
        "dtype": main,
        **({"other_dtypes": others} if others else {}),
    }


def without_tokenizer(folder: Path) -> str:
    """Empty where the folder holds a tokenizer.json, else a sentence that says what it lacks and how to make one."""
    if (folder / "tokenizer.json").is_file():
        return ""
    if others := [name for name in NO_TEXT if (folder / name).is_file()]:
        return (
            f"{folder} holds a {others[0]} and no tokenizer.json, which text needs here; write one with "
            f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})` of transformers."
        )
    return f"{folder} holds no tokenizer.json, so the model takes token ids and no text; copy that of the model's tokenizer there."


def end_ids(folder: Path) -> list[int]:
    """The ids that end a text by the folder's generation_config.json or config.json; none where these say nothing."""
    for name in ("generation_config.json", "config.json"):
        declared = read_object(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        ids = [i for i in (declared if isinstance(declared, list) else [declared]) if isinstance(i, int)]
        if ids:
            return ids
    return []


def import_folder(folder: str | Path, out: str | Path, verify: bool = True) -> Path:
    """Writes a checkpoint (model.safetensors in fp32, config.json, imported.json, and the folder's tokenizer and generation settings) under a
    temporary name, then renames it to `out`. verify: as of `read_stock`."""
    folder, final = Path(folder), Path(out)
    check_absent(final)
    config, tensors = read_stock(folder, verify)
    with new_folder(final) as made:
        write_shards(made, {n: t.nbytes for n, t in tensors.items()}, tensors.__getitem__, 1 << 62)
        write_json(made / "config.json", config.to_dict())
        write_json(made / "imported.json", facts_of(folder, config))
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
    return final


if __name__ == "__main__":
    sys.exit(moved("scripts.import_checkpoint"))
