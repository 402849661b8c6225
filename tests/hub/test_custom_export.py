"""Models that are no stock class: the exported code alone gives the checkpoint's numbers, and every way of generating works on its cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports

from models.config import ModelConfig
from models.hub.export import CHECKER, verify, write_folder
from tests.hub.test_native_export import ATTENTION, MAMBA, checkpoint, config

GRU = {"type": "rnn", "n_heads": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "paragru": config(GRU, learnable_residual=True),
    "paralstm": config({**GRU, "cell": "paralstm", "recurrent_bound": "tanh"}, tie_embeddings=True),
    "mingru": config({**GRU, "cell": "mingru", "d_conv": 0, "gate": False, "norm": False}, d_ff=0),
    "mamba2_mlp": config(MAMBA),
    "hybrid": ModelConfig(
        vocab_size=269,
        d_model=48,
        n_layers=4,
        pattern=["g", "m", "w", "a"],
        mixers={"g": {**GRU, "cell": "gru"}, "m": MAMBA, "w": {**ATTENTION, "window": 7, "qkv_bias": True, "rope_scaling": YARN}, "a": {**ATTENTION, "rope": False}},
    ),
}


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
    jobs = [{"folder": str(o), "ids": ids, "new_tokens": 1, "sample": "a", "out": str(tmp_path / o.name), "ways": True} for _, o in pairs]
    (tmp_path / "job.json").write_text(json.dumps({"folders": jobs}))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", str(CHECKER), str(tmp_path / "job.json")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for job in jobs:
        found = json.loads(Path(job["out"] + ".json").read_text())["ways"]  # type: ignore[operator]
        assert all(found.values()), (job["folder"], found)
