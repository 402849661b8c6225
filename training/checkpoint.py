"""Checkpoints: whole or not there at all, the same for any number of ranks and any ZeRO stage, nothing pickled.

A folder checkpoints/step-XXXXXXXX holds model.safetensors (fp32), optimizer.safetensors (Adam's moments by parameter name),
config.json (the model), run.json (the run), state.json (step, tokens, data fingerprint), rng.safetensors, tokenizer.json and,
written last, COMPLETE.json with the size and SHA-256 of every other file. It is written under a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from models.config import ModelConfig
from models.lm import LanguageModel
from training.engine import Engine
from training.errors import UserError
from training.files import write_json

MARKER = "COMPLETE.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            result.update(block)
    return result.hexdigest()


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name) and (p / MARKER).exists())


def verify(folder: Path, hashes: bool = True) -> str:
    """'' when every file is as the marker says, else one sentence."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return f"{folder} is not a complete checkpoint."
    for name, entry in marker["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            return f"{path} is missing or cut short."
        if hashes and digest(path) != entry["sha256"]:
            return f"{path} does not have the content it was saved with."
    return ""


def newest(run_dir: Path, warn: Any = print) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named through `warn` and passed over."""
    for folder in reversed(checkpoints(run_dir)):
        problem = verify(folder)
        if not problem:
            return folder
        warn(f"passing over a damaged checkpoint: {problem}")
    return None


def save(
    run_dir: Path, engine: Engine, state: dict[str, Any], tokenizer_json: str, run: dict[str, Any], keep: int, milestones: list[int]
) -> Path:
    """Writes the checkpoint of `state['step']` (a collective call) and then drops the oldest ones beyond `keep`.

    Raises UserError when the disk takes no more; what was there before is untouched then.
    """
    final = folder_of(run_dir, state["step"])
    temporary = final.with_name(".tmp-" + final.name)
    world = engine.world
    problem = ""
    if world.main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    weights, moments = _collect(engine)
    if world.main and not problem:
        try:
            _write(temporary, engine, weights, moments, state, tokenizer_json, run)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync(final.parent)
            _drop_old(run_dir, keep, milestones)
        except (OSError, SafetensorError) as error:
            problem = str(error)
            shutil.rmtree(temporary, ignore_errors=True)
    if world.any(bool(problem)):
        raise UserError(
            f"The checkpoint of step {state['step']} could not be written ({problem or 'see rank 0'}); free space on the disk of {run_dir} and run again."
        )
    return final


def _collect(engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    stepped = engine.optimizer_steps() > 0
    if stepped:
        engine.link_moments()
    for name, parameter in engine.parameters.items():
        with engine.gathered([name]):
            if engine.world.main:
                weights[name] = parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
        for key in ("exp_avg", "exp_avg_sq"):
            value = engine.moments(name, key) if stepped else None
            if engine.world.main and value is not None:
                moments[f"{key}.{name}"] = value.detach().to("cpu", torch.float32, copy=True).reshape(weights[name].shape).contiguous()
    return weights, moments


def _write(
    folder: Path,
    engine: Engine,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
    tokenizer_json: str,
    run: dict[str, Any],
) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(moments, folder / "optimizer.safetensors")
    rng = {"cpu": torch.get_rng_state()}
    if engine.world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(engine.world.device)
    save_file(rng, folder / "rng.safetensors")
    module: Any = engine.module
    write_json(folder / "config.json", module.config.to_dict())
    write_json(folder / "run.json", run)
    write_json(
        folder / "state.json",
        {**state, "optimizer_steps": engine.optimizer_steps(), "world_size": engine.world.size, "zero_stage": engine.stage},
    )
    (folder / "tokenizer.json").write_text(tokenizer_json)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    for name in files:
        _sync(folder / name)
    write_json(folder / MARKER, {"format": 1, "files": files})
    _sync(folder / MARKER)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _drop_old(run_dir: Path, keep: int, milestones: list[int]) -> None:
    for folder in checkpoints(run_dir)[:-keep]:
        if int(folder.name.removeprefix("step-")) not in milestones:
            (folder / MARKER).unlink()  # an interrupted removal leaves something that is plainly no checkpoint
            shutil.rmtree(folder, ignore_errors=True)


def find(path: str | Path) -> Path:
    """The folder with model.safetensors behind a run folder, a checkpoint, or an exported folder. Raises UserError."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"There is no {folder}; give a run folder, a checkpoint folder, or a folder with model.safetensors and config.json."
        )
    if (folder / "checkpoints").is_dir():
        found = newest(folder)
        if found is None:
            raise UserError(f"{folder} holds no complete checkpoint yet.")
        return found
    if not (folder / "model.safetensors").exists() or not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model.safetensors with a config.json.")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def load_weights(folder: Path, model: LanguageModel) -> None:
    """Loads model.safetensors into `model`. Raises UserError when the shapes or names are another model's."""
    try:
        tensors = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {error}.") from error
    own = model.state_dict()
    wrong = sorted(k for k in own.keys() | tensors.keys() if k not in own or k not in tensors or own[k].shape != tensors[k].shape)
    wrong = [k for k in wrong if not (k not in tensors and k in own and _is_tied(model, k))]
    if wrong:
        raise UserError(
            f"{folder} holds another model: {len(wrong)} parameter(s) differ, the first is {wrong[0]}; use its own model config or another run_dir."
        )
    model.load_state_dict(tensors, strict=False)


def _is_tied(model: LanguageModel, name: str) -> bool:
    return name not in dict(model.named_parameters())


def restore_optimizer(folder: Path, engine: Engine) -> None:
    """Adam's moments and the random state; weights were loaded before the engine was made."""
    state = read_state(folder)
    if state["optimizer_steps"]:
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            engine.load_moments(lambda key, name: file.get_tensor(f"{key}.{name}"), state["optimizer_steps"])
    rng = load_file(folder / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and engine.world.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], engine.world.device)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, meta) of a run, checkpoint or exported folder; fp32 weights on `device`.

    meta: {'folder', 'step', 'run'} where known. Raises UserError in one sentence for anything that is not such a folder.
    """
    from models.hub.importing import is_foreign, read_stock
    from models.hub.weights import refuse_pickles

    foreign = is_foreign(Path(path))
    folder = Path(path) if foreign else find(path)
    refuse_pickles(folder)
    tensors: dict[str, torch.Tensor] = {}
    try:
        if foreign:
            config, tensors = read_stock(folder)
        else:
            config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    model = LanguageModel(config)
    if foreign:
        model.load_state_dict(tensors, strict=False)
    else:
        load_weights(folder, model)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} holds no tokenizer.json.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta: dict[str, Any] = {"folder": str(folder)}
    for name in ("state", "run"):
        if (folder / f"{name}.json").exists():
            meta[name] = json.loads((folder / f"{name}.json").read_text())
    return model.to(device).eval(), tokenizer, meta
