"""Learnt plans of dense heads on a GPU: under CUDA graphs, and over a run that is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data.loader import Batch
from kernels.dense_rnn.plans import Plans
from models.config import ModelConfig
from models.lm import LanguageModel
from training.graph import WARMUP, GraphedPass

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

T, V = 512, 64
DENSE = ["model=dense_lstm", "size.d_model=128", "model.n_layers=2", "train.seq_len=1024", "train.global_batch=4", "train.micro_batch=2"]
DENSE += ["train.precision=bf16", "eval=end", "eval.tokens=256", "eval.sample_tokens=1", "schedule=constant", "optim.lr=3e-3"]


def dense_model(plans: Plans) -> LanguageModel:
    mixers = {"dense": {"type": "rnn", "cell": "dense_lstm", "n_heads": 2, "head_size": 32}}
    model = LanguageModel(ModelConfig(vocab_size=V, d_model=64, n_layers=2, pattern=["dense"], mixers=mixers))
    model.init_weights(0)
    for block, layer in zip(model.blocks, plans.layers):
        block.mixer.learner = layer.number
    return model.cuda().train()


def text(seed: int) -> Batch:
    ids = torch.randint(V, (3, T + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:].contiguous(), None, [0] * 3)


def test_a_graph_holds_the_plans_it_was_captured_with_and_counts_what_they_need() -> None:
    """Replays are the passes as written under the same plans, bit for bit; so they are under others once what was recorded is forgotten."""
    mine, theirs = (Plans(2, torch.device("cuda")) for _ in range(2))
    one, two = dense_model(mine), dense_model(theirs)
    graphed = GraphedPass(one, torch.device("cuda"), autocast=True)
    for halvings, burn_in in ((0, 32), (1, 0), (9, 0)):
        for plans in (mine, theirs):
            for layer in plans.layers:
                for learnt in layer.passes:
                    learnt.halvings, learnt.burn_in = halvings, burn_in
        graphed.forget()
        for step in range(WARMUP + 3):
            for model in (one, two):
                model.zero_grad(set_to_none=True)
            batch = text(step)
            replayed = graphed.run(batch, 0.01)
            assert not graphed.why_not and (replayed is not None) == (step >= WARMUP), graphed.why_not
            for model in (two,) if replayed is not None else (one, two):
                with torch.autocast("cuda", torch.bfloat16):
                    output = model(batch.input_ids.cuda(), labels=batch.labels.cuda())
                ((output.loss_sum + output.z_loss_sum) * 0.01).backward()
            for plans in (mine, theirs):
                plans.collect()
            torch.cuda.synchronize()
            assert mine.words() == theirs.words(), (halvings, step)
            assert (sum(mine.words()) > 0) == (halvings < 9)
            for (name, p), q in zip(one.named_parameters(), two.parameters()):
                assert torch.equal(p.grad, q.grad), (halvings, step, name)


@pytest.mark.parametrize("again", ["none", "states"])
def test_a_killed_run_goes_on_bit_for_bit_while_plans_change(again: str, train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Graphs included: cut at a step between two choices, several choices after the start; states kept, and made again from borders."""
    from safetensors.torch import load_file

    for name, steps in (("whole", 60), ("cut", 29), ("cut", 60)):
        done = train(name, *DENSE, f"train.steps={steps}", f"train.activation_checkpointing={again}")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    whole, cut = (max((p.parent for p in (tmp_path / name).rglob("state.json")), key=lambda f: f.name) for name in ("whole", "cut"))
    states = [json.loads((folder / "state.json").read_text())["plans"] for folder in (whole, cut)]
    assert states[0] == states[1]
    assert any(len(one["seen"]) > 1 for layer in states[0]["layers"] for one in layer), "no plan changed"
    weights = [load_file(next(folder.glob("model*.safetensors"))) for folder in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
