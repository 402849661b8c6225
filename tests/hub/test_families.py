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

import pytest
import torch
from safetensors.torch import load_file

from models.hub.export import CHECKER, GREEDY, main
from models.session import Session
from models.sampling import Sampling
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
def test_every_family_is_loaded_by_transformers_alone(train: Callable[..., object], tmp_path: Path) -> None:
    jobs = []
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    for name, (_, overrides) in FAMILIES.items():
        done = train(name, *overrides, "size=tiny", "train.steps=3")
        assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
        assert main([str(tmp_path / name), str(tmp_path / "hf" / name), "--shard-size", "1MB"]) == 0
        job = {"folder": str(tmp_path / "hf" / name), "ids": ids.tolist(), "new_tokens": GREEDY, "sample": "It is.", "ways": True}
        jobs.append({**job, "out": str(tmp_path / f"{name}.out")})
    (tmp_path / "job.json").write_text(json.dumps({"folders": jobs}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [os.environ.get("CLEAN_PYTHON", sys.executable), "-I", str(CHECKER), str(tmp_path / "job.json")]
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr[-3000:]
    for (name, (architecture, _)), job in zip(FAMILIES.items(), jobs):
        model, found = load_model(find(tmp_path / name))[0].eval(), load_file(job["out"])  # type: ignore[arg-type]
        seen = json.loads(Path(str(job["out"]) + ".json").read_text())
        with torch.no_grad():
            gap = float((model(ids).logits - found["fp32"]).abs().max())
        text = Session(model, ids[:1]).generate(GREEDY, Sampling(0))
        print(f"{name}: {seen['class']}, largest difference of logits {gap:.1e}, ways {seen['ways']}")
        assert seen["class"] == architecture and gap < 1e-4, (name, gap)
        assert torch.equal(text, found["greedy"]), name
        assert seen["ways"]["pipeline"] and all(seen["ways"].values()), (name, seen["ways"])
