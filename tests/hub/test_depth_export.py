"""Looped models as exported folders: the code alone gives the checkpoint's numbers, with a state for each loop in its cache, and they come back."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.checkpoint import load_model
from models.config import ModelConfig
from models.hub.export import write_folder
from models.hub.importing import load_into, resolved
from models.lm import LanguageModel
from tests.hub.test_native_export import ATTENTION, MAMBA, checkpoint

HYBRID: dict[str, Any] = {
    "vocab_size": 269, "d_model": 48, "pattern": ["m", "g", "a"], "mixers": {"m": MAMBA, "g": {"type": "rnn", "n_heads": 4}, "a": ATTENTION},
}  # fmt: skip
FAMILIES = {
    "halting": ModelConfig(**HYBRID, n_layers=2, depth={"type": "universal", "loops": 3, "halting": True}),
    "recurrent": ModelConfig(**HYBRID, n_layers=4, depth={"type": "recurrent", "loops": 3, "backprop": 1}),
}
IDS = torch.tensor([[(7 * i * i + row) % 251 + 1 for i in range(17)] for row in range(2)])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_looped_model_is_exported_and_comes_back(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = checkpoint(tmp_path / "run", FAMILIES[name]), tmp_path / f"looped_{name}"
    out.mkdir()
    assert write_folder(source, out, None, 10**9, "apache-2.0").architecture == "EverywhenForCausalLM"
    wanted = load_model(source)[0](IDS).logits
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        code: Any = importlib.import_module(f"{out.name}.modeling_everywhen")
        settings = code.EverywhenConfig(**json.loads((out / "config.json").read_text()))
        theirs = code.EverywhenForCausalLM(settings).eval()
        assert not hasattr(theirs.model.depth, "begin_step")
        tensors = load_file(out / "model.safetensors")
        assert not theirs.load_state_dict(tensors, strict=False).unexpected_keys and any(".depth." in key for key in tensors)
        torch.testing.assert_close(theirs(IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        cache: Any = None
        parts = []
        for piece in IDS.split([9, *[1] * 8], 1):
            output = theirs(piece, past_key_values=cache, use_cache=True)
            cache = output[code.CACHE]
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-4)
        assert len(cache) == len(theirs.model.depth.visits()) > FAMILIES[name].n_layers
    finally:
        for module in [n for n in sys.modules if n.startswith(out.name)]:
            del sys.modules[module]
    back = LanguageModel(ModelConfig.from_dict(resolved({"vocab_size": 269, "init_from": str(out), "verify": False})))
    load_into(out, back, verify=False)
    assert torch.equal(back.eval()(IDS).logits, wanted)
