"""The bars of an export: every family, size tiny, trained a few steps, exported by the command, and loaded by transformers alone.

CLEAN_PYTHON=PATH names a Python that has only torch and transformers, to load the folders with; else it is this one, without the project.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.hub.export import CHECKER, GREEDY, write_folder
from models.sampling import Sampling
from models.session import Session
from training.checkpoint import find, load_model

FAMILIES = {
    "transformer": ("LlamaForCausalLM", ["model=transformer"]),
    "mamba2": ("Mamba2ForCausalLM", ["model=mamba2"]),
    "paragru": ("EverywhenForCausalLM", ["model=paragru"]),
    "paralstm": ("EverywhenForCausalLM", ["model=paralstm"]),
    "hybrid": ("EverywhenForCausalLM", ["model=hybrid"]),
    "mamba2_attention": ("BambaForCausalLM", ["model=hybrid", "model.pattern=[mamba2,mamba2,attention]"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_loaded_by_transformers_alone(name: str, train: Callable[..., object], tmp_path: Path) -> None:
    architecture, overrides = FAMILIES[name]
    done = train(name, *overrides, "size=tiny", "train.steps=3")
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    source, folder = find(tmp_path / name), tmp_path / "hf"
    folder.mkdir()
    write_folder(source, folder, "fp32", 10**6, "apache-2.0")
    gap, same, seen = loaded_alone(source, folder, tmp_path)
    print(f"{name}: {seen['class']}, largest difference of logits {gap:.1e}, ways {seen['ways']}")
    assert seen["class"] == architecture and gap < 1e-4 and same
    assert seen["ways"]["pipeline"] and all(seen["ways"].values()), seen["ways"]


def loaded_alone(source: Path, folder: Path, scratch: Path) -> tuple[float, bool, dict[str, Any]]:
    """(largest difference of fp32 logits, whether 64 greedy tokens are equal, what else was seen) in a process without the project."""
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    job = {"folder": str(folder), "ids": ids.tolist(), "new_tokens": GREEDY, "sample": "It is.", "ways": True, "out": str(scratch / "found")}
    (scratch / "job.json").write_text(json.dumps({"folders": [job]}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [os.environ.get("CLEAN_PYTHON", sys.executable), "-I", str(CHECKER), str(scratch / "job.json")]
    checked = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr[-3000:]
    model, found = load_model(source)[0], load_file(scratch / "found")
    with torch.no_grad():
        gap = float((model(ids).logits - found["fp32"]).abs().max())
    text = Session(model, ids[:1]).generate(GREEDY, Sampling(0))
    return gap, torch.equal(text, found["greedy"]), json.loads((scratch / "found.json").read_text())
