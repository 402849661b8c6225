"""Passes replayed as CUDA graphs against the same passes as written, on documents that end elsewhere in every batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import Batch
from models.config import ModelConfig
from models.lm import LanguageModel
from models.segments import Documents, documents_in, most_documents
from tests.conftest import SMALL, run_program, run_ranks
from training.graph import WARMUP, GraphedPass, GraphedUpdate
from training.optim.muon import MuonWithAdamW

T, V = 96, 64


def packed(rows: int, seed: int, documents: float = 0.05) -> Batch:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, T + 1), generator=draws)
    segments = (torch.rand(rows, T, generator=draws) < documents).cumsum(1).int()
    return Batch(ids[:, :-1], ids[:, 1:].contiguous(), segments, [0] * rows)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("rows,length", [(1, 1), (1, 7), (3, 96), (2, 400)])
def test_borders_of_fixed_number_are_those_of_the_documents_and_ends(rows: int, length: int, share: float) -> None:
    segments = (torch.rand(rows, length) < share).cumsum(1)
    documents = Documents(segments)
    borders, room = documents._fixed_borders(), most_documents(rows * length)
    wanted, number = documents.borders(), documents_in(segments)
    assert len(wanted) == number + 1 and len(borders) == room + 1 and borders.dtype == torch.int32
    if number <= room:
        assert torch.equal(borders[: number + 1], wanted) and (borders[number:] == rows * length).all()


class Recorded:
    """Stands for a graph: says how often it was replayed."""

    def __init__(self, gradients: list[torch.Tensor]) -> None:
        self.gradients, self.graph, self.loss_sum, self.replays = gradients, self, torch.zeros((), dtype=torch.float64), 0

    def fill(self, batch: Batch, scale: float) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1


def test_a_graph_adds_to_no_gradients_but_its_own() -> None:
    """A first micro-batch that ran as written (too many documents for a graph) has left gradients that a graph would lose."""
    model = torch.nn.Linear(2, 2)
    graphed = GraphedPass(model, torch.device("cpu"), autocast=False)
    batch, gradients = packed(3, 0), [torch.zeros_like(p) for p in model.parameters()]
    first, adding = Recorded(gradients), Recorded(gradients)
    key = (batch.input_ids.shape, True)
    graphed.graphs = {(*key, False): first, (*key, True): adding}  # type: ignore[dict-item]
    graphed.calls = dict.fromkeys(graphed.graphs, WARMUP)
    written = [torch.ones_like(p) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), written):
        parameter.grad = gradient
    assert graphed.run(batch, 1.0) is None and not adding.replays
    assert all(p.grad is g for p, g in zip(model.parameters(), written))
    model.zero_grad(set_to_none=True)
    assert graphed.run(batch, 1.0) is not None and graphed.run(batch, 1.0) is not None
    assert (first.replays, adding.replays) == (1, 1) and all(p.grad is g for p, g in zip(model.parameters(), gradients))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["deepspeed=zero0"],
        ["deepspeed=zero1", "deepspeed.bucket_bytes=40000"],
        ["deepspeed=zero2", "train.precision=bf16", "train.micro_batch=4"],  # some gradients are summed in bf16
    ],
    ids=lambda more: more[0],
)
def test_gradients_of_replayed_passes_are_summed_over_ranks(train: Any, demo_shards: Path, tmp_path: Path, more: list[str]) -> None:
    """Two micro-batches a step on two ranks (under ZeRO-2, which sums each, one): the losses of passes through DeepSpeed, bit for bit. One pass of the first step is run as written;
    from the fourth step on the graph has given up and DeepSpeed reduces by itself."""
    words = ["train.steps=5", "train.log_every=1", "train.global_batch=8", "train.micro_batch=2", *more]
    assert train("written", *words, ranks=2).returncode == 0
    arguments = ["-m", "tests.training.graph_ranks", *SMALL, f"data.path={demo_shards}", f"run_dir={tmp_path / 'outside'}", *words]
    done = run_ranks(2, arguments)
    assert done.returncode == 0 and "Passes ran outside." in done.stdout + done.stderr, done.stderr
    losses = [
        [
            (row["loss"], row["grad_norm"])
            for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in row
        ]
        for name in ("written", "outside")
    ]
    assert len(losses[0]) == 5 and losses[0] == losses[1]


def model_of(pattern: list[str]) -> LanguageModel:
    mixers = {
        "attention": {"type": "attention", "n_heads": 2},
        "paragru": {"type": "rnn", "cell": "paragru", "n_heads": 2},
        "mamba2": {"type": "mamba2", "d_state": 16, "head_dim": 16},
    }
    model = LanguageModel(ModelConfig(V, 64, 4, pattern, {name: mixers[name] for name in pattern}, d_ff=-1, z_loss=1e-4))
    model.init_weights(0)
    return model.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", [["paragru"], ["mamba2"], ["attention"], ["paragru", "attention", "mamba2"]], ids="-".join)
def test_a_replayed_pass_is_the_pass_as_written(pattern: list[str]) -> None:
    """Two micro-batches a step, so that gradients are written once and added to once. Attention's gradients do not repeat to the last bit."""
    one, two = model_of(pattern), model_of(pattern)
    graphed = GraphedPass(one, torch.device("cuda"), autocast=True)
    replays = 0
    for step in range(WARMUP + 3):
        for model in (one, two):
            model.zero_grad(set_to_none=True)
        for micro in range(2):
            batch, scale = packed(3, 10 * step + micro), 0.01 * (step + 1)
            on_gpu = batch.to(torch.device("cuda"))
            replayed = graphed.run(batch, scale)
            assert not graphed.why_not, graphed.why_not
            replays += replayed is not None
            for model in (two,) if replayed is not None else (one, two):
                with torch.autocast("cuda", torch.bfloat16):
                    output = model(on_gpu.input_ids, labels=on_gpu.labels, segment_ids=on_gpu.segment_ids)
                ((output.loss_sum + output.z_loss_sum) * scale).backward()
            if replayed is not None:
                torch.testing.assert_close(replayed, output.loss_sum.double(), rtol=1e-3 if "attention" in pattern else 0, atol=0)
        for (name, p), q in zip(one.named_parameters(), two.parameters()):
            if "attention" in pattern:
                assert (p.grad - q.grad).norm() <= 2e-2 * q.grad.norm() + 1e-9, (step, name)
            else:
                assert torch.equal(p.grad, q.grad), (step, name)
        with torch.no_grad():
            for p in (*one.parameters(), *two.parameters()):
                p.mul_(1.01)  # as an update changes them, which casts ahead of a pass have to follow
    assert replays == 2 * 3 and len(graphed.graphs) == 2
    assert graphed.run(packed(3, 0, documents=0.9), 1.0) is None  # more documents than a graph has room for


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pass_that_waits_for_the_device_runs_as_written() -> None:
    model = model_of(["paragru"])
    loss = model._loss
    model._loss = lambda *given: (given[0].sum().item(), loss(*given))[1]  # type: ignore[method-assign]
    graphed = GraphedPass(model, torch.device("cuda"), autocast=True)
    for step in range(WARMUP + 2):
        model.zero_grad(set_to_none=True)
        assert graphed.run(packed(3, step), 1.0) is None
    assert "cannot be recorded" in graphed.why_not and len(graphed.news()) == 1 and not graphed.news()
    assert torch.rand(2, device="cuda").unique().numel() == 2, "random numbers are drawn outside the graph that failed"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    other, held = torch.cuda.Stream(), torch.cuda.memory_reserved()
    for _ in range(20):  # blocks that a second stream has used are recycled, as those that ZeRO-3 gathers
        torch.empty(1 << 28, dtype=torch.int8, device="cuda").record_stream(other)
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - held <= 2 << 28


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_passes_of_a_run_are_replayed(demo_shards: Path, tmp_path: Path) -> None:
    """Through train.py and DeepSpeed, one micro-batch a step: its timer once ended the recording, which begins in the third step."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    words = ["train.device=cuda", "train.steps=5", "train.global_batch=2", "train.micro_batch=2", f"run_dir={tmp_path / 'graphed'}"]
    done = run_program(["train.py", *SMALL, f"data.path={demo_shards}", *words], started=True, CUDA_VISIBLE_DEVICES=gpus)
    assert done.returncode == 0 and "are replayed as a CUDA graph" in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_update_of_muon_is_the_update_as_written() -> None:
    """Passes and updates are replayed in turns, in one memory; rates and the clipping differ from step to step. Bit for bit, momentum too."""
    shape = ModelConfig(V, 256, 2, ["paragru"], {"paragru": {"type": "rnn", "cell": "paragru", "n_heads": 2}}, d_ff=512)
    models = [LanguageModel(shape), LanguageModel(shape)]
    for model in models:
        model.init_weights(0)
        model.cuda()
    one, two = (MuonWithAdamW(m, lr=1e-3, muon_lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1) for m in models)
    passes = [GraphedPass(model, torch.device("cuda"), autocast=True) for model in models]
    one.replay = update = GraphedUpdate(passes[0])
    for step in range(2 * WARMUP + 4):
        for model, graphed, optimizer in zip(models, passes, (one, two)):
            model.zero_grad(set_to_none=True)
            batch = packed(4, step)
            if graphed.run(batch, 1e-2) is None:
                graphed.as_written(batch.to(torch.device("cuda")), 1e-2)
            optimizer.grad_scale = torch.tensor(1.0 + 0.1 * step, device="cuda")
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step)
            optimizer.step()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
            assert torch.equal(p, q), (step, name, update.why_not)
    assert len(update.graphs) == len(one.stacks) > 1 and not update.why_not
    for a, b in zip(one.stacks, two.stacks):
        assert torch.equal(a.momentum, b.momentum)
