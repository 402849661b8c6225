"""Whether code that lies in a model's folder may be run: only if the person asks for it, or if it is to the letter what this project writes."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from models.hub.weights import read_object
from training.errors import UserError


def may_run_code(folder: Path, asked: bool) -> bool:
    """What transformers is to be told about the folder's own code. Raises UserError where the model needs it and nobody asked for it.

    asked: trust_remote_code=true of the command line.
    """
    if asked:
        return True
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    table = config.get("auto_map")
    if not isinstance(table, dict) or _known(config):
        return False  # transformers has the class itself, or there is nothing to run
    if is_our_code(folder, table):
        return True
    names = sorted({str(v).split(".")[0] + ".py" for v in table.values()})
    raise UserError(
        f"{folder} brings code of its own ({', '.join(names)}), which this program runs only when told to: read it, then add trust_remote_code=true."
    )


def _known(config: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_our_code(folder: Path, table: dict[str, Any]) -> bool:
    """Whether the folder's Python files are those, letter for letter, that this version writes for its config.json, and no others are named."""
    from models.hub.custom import custom, write_code
    from models.hub.importing import read_stock_config

    try:
        config = read_stock_config(folder)
        expected = custom(config, 1).config["auto_map"]
        if table != expected or names_code(folder / "tokenizer_config.json"):
            return False
        with tempfile.TemporaryDirectory() as scratch:
            write_code(config, Path(scratch))
            ours = {p.name: p.read_bytes() for p in Path(scratch).iterdir()}
        theirs = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.py")}
        return theirs == ours
    except (UserError, ValueError, KeyError, TypeError, OSError):  # not a config that this version writes
        return False


def names_code(path: Path) -> bool:
    """Whether a config names classes that are not transformers' own. Raises UserError for a file that is no JSON object."""
    return path.is_file() and bool(read_object(path).get("auto_map"))


def code_hash(folder: Path) -> str:
    """SHA-256 of all Python files of a folder, '' without any."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(data)} ".encode() + data)
    return digest.hexdigest()
