"""Paths through the layers of a model: the whole path is the model to the bit, and a layer that does nothing costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.errors import UserError
from data.tokenizer import byte_tokenizer
from evals import layer_paths as program
from evals.adapters.base import ItemError
from evals.layer_paths import along, layer_paths, losses_along, single_edits
from tests.evals.conftest import llama, own, own_adapter

IDS = torch.randint(320, (4, 33), generator=torch.Generator().manual_seed(0))


def test_the_whole_path_is_the_model_to_the_bit() -> None:
    model = own("mga")
    wanted = model(IDS).logits
    with along(model, range(3)):
        assert torch.equal(model(IDS).logits, wanted)
    with along(model, [0, 0, 2]):
        assert not torch.equal(model(IDS).logits, wanted)
    assert torch.equal(model(IDS).logits, wanted), "and afterwards it is the old one"


@torch.no_grad()
def test_a_path_is_a_model_of_these_layers_and_decodes() -> None:
    model, path = own("mga"), [0, 2, 2, 1]
    longer = own("maag", n_layers=4)
    longer.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks")}, strict=False)
    for place, layer in enumerate(path):
        longer.blocks[place].load_state_dict(model.blocks[layer].state_dict())
    wanted = longer(IDS).logits
    with along(model, path):
        torch.testing.assert_close(model(IDS).logits, wanted)
        state, parts = model.init_state(4), []
        for t in range(IDS.shape[1]):
            output = model(IDS[:, t : t + 1], state=state)
            state = output.state
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-4)


def test_a_layer_that_does_nothing_costs_nothing_and_the_cheapest_goes_first() -> None:
    adapter = own_adapter("mgma", n_layers=4)
    with torch.no_grad():
        adapter.model.blocks[2].mixer.out_proj.weight.zero_()
        adapter.model.blocks[2].mlp.down.weight.zero_()
    result = layer_paths(adapter, IDS, budget=0.0)
    rows = result["layers"]
    assert rows[2]["skip"][0] == rows[2]["repeat"][0] == 0 and rows[2]["mixer"] == "m"
    assert all(abs(rows[i]["skip"][0]) > 1e-3 for i in (0, 1, 3))
    least = min(range(4), key=lambda i: rows[i]["skip"][0])
    first = layer_paths(adapter, IDS, budget=100.0)["shortened"][0]
    assert first["left_out"] == least and first["nats_per_token"] == pytest.approx(result["nats_per_token"] + rows[least]["skip"][0])
    assert "swap" not in rows[3] and len(single_edits(4)) == 11
    with pytest.raises(ValueError, match="layers are 0 to 3"):
        losses_along(adapter, IDS, [4])


def test_the_program_writes_a_page_and_refuses_others_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = own("mg", n_layers=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert program.main([f"checkpoint={tmp_path}", "length=32", "rows=2", "device=cpu"]) == 0
    report = json.loads((tmp_path / "layer_paths.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1] and "| 1 | g |" in (tmp_path / "layer_paths.md").read_text()
    assert program.main(["length=1"]) == 2 and "checkpoint=DIR" in capsys.readouterr().err
    model.depth = torch.nn.Identity()  # as a looped model has it
    model.config.depth = {"type": "some"}
    with pytest.raises(UserError, match="model.depth=some says itself how often"), along(model, [0]):
        pass
    from evals.adapters.hf import HFAdapter

    with pytest.raises(ItemError, match="import it first"):
        layer_paths(HFAdapter(llama(), None, "llama", "llama"), IDS)
