"""Models that are no stock class: the exported code alone gives the checkpoint's numbers, and every way of generating works on its cache."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports

from kernels.parallel_rnn.reference import parallel
from models import cells, mixers
from models.cells import load_cell
from models.config import ModelConfig
from models.hub.custom import write_code
from models.hub.export import CHECKER, verify, write_folder
from models.hub.flatten import modeling
from tests.hub.test_native_export import ATTENTION, MAMBA, checkpoint, config

GRU = {"type": "rnn", "n_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "paragru": config(GRU, learnable_residual=True),
    "paralstm": config({**GRU, "cell": "paralstm", "recurrent_bound": "tanh"}, tie_embeddings=True),
    "mingru": config({**GRU, "cell": "mingru", "d_conv": 0, "gate": False, "norm": False}, d_ff=0),
    "slstm": config({**GRU, "cell": "slstm", "head_size": 16, "bias_init": {"f": [1.0, 3.0], "z": -1}}),
    "m2rnn": config({"type": "m2rnn", "n_heads": 4, "n_k_heads": 2, "expand_v": 1.5}),
    "mamba2_mlp": config(MAMBA),
    "norms": ModelConfig(
        vocab_size=269,
        d_model=48,
        n_layers=2,
        pattern=["m", "a"],
        mixers={"m": MAMBA, "a": {**ATTENTION, "qk_norm": True, "qk_norm_over": "heads", "qk_norm_centred": True, "output_gate": True}},
        norm_after=["a"],
        centred_norms=True,
    ),
    "delta": ModelConfig(
        vocab_size=269,
        d_model=48,
        n_layers=3,
        pattern=["g", "p", "d"],
        mixers={
            "g": {"type": "delta", "n_heads": 4, "n_k_heads": 2, "expand_v": 1.5},
            "p": {"type": "delta", "n_heads": 2, "head_dim": 8, "updates": 2, "negative": True},
            "d": {"type": "delta", "gate": False, "output_gate": False},
        },
    ),
    "hybrid": ModelConfig(
        vocab_size=269,
        d_model=48,
        n_layers=4,
        pattern=["g", "m", "w", "a"],
        mixers={
            "g": {**GRU, "cell": "gru"},
            "m": MAMBA,
            "w": {**ATTENTION, "window": 7, "qkv_bias": True, "rope_scaling": YARN},
            "a": {**ATTENTION, "rope": False},
        },
    ),
}
WAYS = ("hybrid", "delta", "slstm", "m2rnn")  # every kind of state, in every way that transformers calls a model


def test_any_mixers_and_cells_lie_in_one_file() -> None:
    code = modeling(mixers.available(), cells.available(), [])
    compile(code, "modeling_everywhen.py", "exec")
    assert "from models" not in code and "from kernels" not in code


def test_the_exported_code_gives_the_checkpoints_numbers(tmp_path: Path) -> None:
    pairs = []
    for name, settings in FAMILIES.items():
        source, out = checkpoint(tmp_path / "runs" / name, settings), tmp_path / "out" / name
        out.mkdir(parents=True)
        dtype = "bf16" if name == "paralstm" else "fp32"
        assert write_folder(source, out, dtype, 10**9, "apache-2.0").architecture == "EverywhenForCausalLM"
        code = (out / "modeling_everywhen.py").read_text()
        if dtype == "bf16":
            kinds = {k: v.dtype for k, v in load_file(out / "model.safetensors").items()}
            assert kinds["model.layers.0.mixer.recurrent"] == torch.float32 and kinds["model.norm.weight"] == torch.bfloat16
        assert "from models" not in code and "from kernels" not in code
        assert "triton" not in get_imports(out / "modeling_everywhen.py")  # else transformers refuses the file where it is not installed
        pairs.append((source, out))
    verify(pairs)
    ids = [[(7 * i * i + row) % 251 + 1 for i in range(23)] for row in range(2)]
    folders = [out for _, out in pairs if out.name in WAYS]
    jobs = [{"folder": str(o), "ids": ids, "new_tokens": 1, "sample": "a", "out": str(tmp_path / o.name), "ways": True} for o in folders]
    (tmp_path / "job.json").write_text(json.dumps({"folders": jobs}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", str(CHECKER), str(tmp_path / "job.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for job in jobs:
        found = json.loads(Path(job["out"] + ".json").read_text())["ways"]  # type: ignore[operator]
        assert all(found.values()), (job["folder"], found)


JUMPING = """import torch
from kernels.parallel_rnn.cell import Pre, Rec, State


def step(z: Pre, c: Pre, a: Rec, h: State) -> tuple[State]:
    z = torch.relu(z + a * h)
    return (torch.where(h > 0.5, c - 0.3 * z, torch.tanh(c) + 0.2 * h),)
"""


def test_a_cell_with_kinks_and_jumps_is_solved_as_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small solves, ours and the exported file's: what the solver asks of a cell has to be in the file."""
    for folder in ("cells", "jumping_export"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cells" / "jumping.py").write_text(JUMPING)
    monkeypatch.setattr(cells, "__path__", [*cells.__path__, str(tmp_path / "cells")])
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        write_code(config({**GRU, "cell": "jumping"}), tmp_path / "jumping_export")
        exported, cell = importlib.import_module("jumping_export.modeling_everywhen"), load_cell("jumping")
        there = exported.load_cell("jumping")
        assert cell.lowered and there.jumps and there.derivatives is not None
        pre, rec, h0 = torch.randn(2, 300, 2, 8), torch.randn(1, 8), torch.randn(2, 1, 8)
        found, final = exported.parallel_rnn(there, pre, rec, h0, None)
        wanted, last = parallel(cell, pre, rec, h0, None)
        assert torch.equal(found, wanted) and torch.equal(final, last)
    finally:
        for name in [n for n in sys.modules if n == "models.cells.jumping" or n.startswith("jumping_export")]:
            del sys.modules[name]
