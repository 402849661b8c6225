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

from models.checkpoint import find, load_model
from models.hub.export import CHECKER, GREEDY, write_folder
from models.hub.native_delta import too_old
from models.sampling import Sampling
from models.session import Session

FAMILIES = {
    "transformer": ("LlamaForCausalLM", ["model=transformer"]),
    "mamba2": ("Mamba2ForCausalLM", ["model=mamba2"]),
    "paragru": ("EverywhenForCausalLM", ["model=paragru"]),
    "paralstm": ("EverywhenForCausalLM", ["model=paralstm"]),
    "hybrid": ("EverywhenForCausalLM", ["model=hybrid"]),
    "gdn_hybrid": ("Qwen3_5ForCausalLM", ["model=gdn_hybrid"]),
    "mamba2_attention": ("BambaForCausalLM", ["model=hybrid", "model.pattern=[mamba2,mamba2,attention]"]),
}
if too_old("Qwen3_5ForCausalLM"):
    FAMILIES["gdn_hybrid"] = "EverywhenForCausalLM", FAMILIES["gdn_hybrid"][1]


@pytest.mark.slow
def test_every_family_is_loaded_by_transformers_alone(train: Callable[..., object], tmp_path: Path) -> None:
    sources, folders = {}, {name: tmp_path / "hf" / name for name in FAMILIES}
    for name, (_, overrides) in FAMILIES.items():
        done = train(name, *overrides, "size=tiny", "train.steps=3")
        assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
        sources[name] = find(tmp_path / name)
        folders[name].mkdir(parents=True)
        write_folder(sources[name], folders[name], "fp32", 10**6, "apache-2.0")
    for name, (gap, same, seen) in loaded_alone(sources, folders, tmp_path).items():
        print(f"{name}: {seen['class']}, largest difference of logits {gap:.1e}, ways {seen['ways']}")
        assert seen["class"] == FAMILIES[name][0] and gap < 1e-4 and same, name
        assert seen["ways"]["pipeline"] and all(seen["ways"].values()), (name, seen["ways"])


def loaded_alone(sources: dict[str, Path], folders: dict[str, Path], scratch: Path) -> dict[str, tuple[float, bool, dict[str, Any]]]:
    """(largest difference of fp32 logits, whether 64 greedy tokens are equal, what else was seen) by family, in one process without the project."""
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    job = {"ids": ids.tolist(), "new_tokens": GREEDY, "sample": "It is.", "ways": True}
    jobs = [{**job, "folder": str(folder), "out": str(scratch / f"found-{name}")} for name, folder in folders.items()]
    (scratch / "job.json").write_text(json.dumps({"folders": jobs}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [os.environ.get("CLEAN_PYTHON", sys.executable), "-I", str(CHECKER), str(scratch / "job.json")]
    checked = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr[-3000:]
    results = {}
    for name, source in sources.items():
        model, found = load_model(source)[0], load_file(scratch / f"found-{name}")
        with torch.no_grad():
            gap = float((model(ids).logits - found["fp32"]).abs().max())
        text = Session(model, ids[:1]).generate(GREEDY, Sampling(0))
        results[name] = (gap, torch.equal(text, found["greedy"]), json.loads((scratch / f"found-{name}.json").read_text()))
    return results
