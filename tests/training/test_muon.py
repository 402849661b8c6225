"""Muon beside AdamW: against the singular value decomposition, plain loops and torch's AdamW; over ranks, across kills, in the estimate of memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import nn

from kernels.symmetric import symmetric
from models.hub.weights import Weights
from models.init import is_hidden_matrix, roles, tag
from models.lm import LanguageModel
from tests.conftest import run_program, run_ranks
from training.checkpoint import checkpoints, newest
from training.config.cli import checked, compose_config
from training.cost import memory
from training.errors import UserError
from training.optim import newton_schulz
from training.optim.muon import MuonWithAdamW, plan, shapes_of, slabs
from training.optim.newton_schulz import STEPS, coefficients, orthogonalized
from training.setup import model_config

SMALL = ["size=tiny", "model.vocab_size=64", "data.path=nowhere"]
ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def small(*words: str) -> LanguageModel:
    model = LanguageModel(model_config(checked(compose_config([*SMALL, *words])), None)[0])
    model.init_weights(0)
    return model


def with_gradients(model: nn.Module, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draws) * 10 ** float(torch.randn((), generator=draws))


def followed(values: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Singular values (..., n) after so many steps, by their polynomials alone."""
    s = values / (1.01 * (values**4).sum(-1, keepdim=True) ** 0.25)
    return polynomials(s, steps)


def polynomials(s: torch.Tensor, steps: int) -> torch.Tensor:
    for i in range(steps):
        s = sum(c * s ** (2 * j + 1) for j, c in enumerate(coefficients(i, steps)))  # type: ignore[assignment]
    return s


def exact(x: torch.Tensor) -> torch.Tensor:
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u * followed(s)[..., None, :] @ v


def test_updates_that_something_else_runs_are_the_same_updates() -> None:
    """As a CUDA graph does (tests/training/test_graph.py), which is asked for by the memory of gradients and momentum, and may decline."""
    one, two = small("optim=muon"), small("optim=muon")
    optimizers = [MuonWithAdamW(model, muon_lr=1e-2, **ADAMW) for model in (one, two)]
    asked = []

    def replay(key: Any, compute: Sequence[Callable[[Any], torch.Tensor]], divisor: Any) -> Iterator[torch.Tensor] | None:
        asked.append(key)
        return (one(divisor) for one in compute) if len(asked) > 1 else None

    optimizers[0].replay = replay
    for step in range(3):
        for model, optimizer in zip((one, two), optimizers):
            with_gradients(model, step)
            optimizer.grad_scale = torch.tensor(2.0)
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters())), step
    assert len(asked) == 3


@pytest.mark.parametrize("rows, columns", [(24, 24), (16, 40), (40, 16), (1, 8)])
@pytest.mark.parametrize("steps", [1, 2, 3, STEPS, 7])
def test_the_directions_are_those_of_the_singular_value_decomposition(rows: int, columns: int, steps: int) -> None:
    """Singular vectors are kept, values are those of the polynomials, and the scale of the matrix does not count."""
    x = torch.randn(5, rows, columns, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalized(x, steps)
    values = u.mT @ y @ v.mT
    torch.testing.assert_close(values, torch.diag_embed(followed(s, steps)), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(orthogonalized(1e-12 * x, steps), y)
    low = orthogonalized(x.bfloat16(), steps, torch.float16)
    assert low.dtype == torch.float16 and (low - y).norm() < (0.08 if steps == 2 else 0.04) * y.norm()
    assert (orthogonalized(torch.zeros(2, rows, columns), steps) == 0).all()
    assert orthogonalized(1e-25 * x.float(), steps, torch.float16).isfinite().all(), "squares that are none"


def test_four_steps_do_what_five_of_one_polynomial_do() -> None:
    """Values down to 1/400 of the largest come near 1; over spectra of 1,024 that fall by a power of their place, the update points where
    five steps of Jordan's polynomial, of values over the root of the sum of their squares, make it point, to 0.04 of a cosine."""
    for steps, least in ((STEPS, 1 / 398), (3, 1 / 100), (2, 1 / 80)):
        s = polynomials(torch.linspace(least, 1, 10000, dtype=torch.float64), steps)
        assert s.min() > 0.7 and s.max() < 1.29
    for falls in (0.0, 0.3, 0.5, 0.75, 1.0):
        values = torch.arange(1, 1025, dtype=torch.float64) ** -falls
        four, five = followed(values), values / values.norm()
        for _ in range(5):
            five = 3.4445 * five - 4.775 * five**3 + 2.0315 * five**5
        cosines = [float(v.sum() / (v.norm() * 32)) for v in (four, five)]
        assert cosines[0] > cosines[1] - 0.04, (falls, cosines)
    assert followed(torch.logspace(-3, 0, 32, dtype=torch.float64), 9).min() > 0.9, "more steps reach smaller values"


@pytest.mark.parametrize("falls", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("rows, columns", [(48, 132), (132, 48), (64, 64)])
def test_small_values_do_not_grow_out_of_rounding(rows: int, columns: int, falls: float) -> None:
    """Spectra that fall by a power of their place, as those of gradients do: no value above those of exact steps, whichever matrix is iterated. The
    kernel stores one half of a symmetric product twice, and so is done here."""
    small = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, small, dtype=torch.float64))[0] for n in (rows, columns))
    x = ((u * torch.arange(1, small + 1) ** -falls) @ v.mT)[None]
    wanted = exact(x)
    torch.testing.assert_close(orthogonalized(x), wanted, atol=1e-7, rtol=1e-7)
    assert (orthogonalized(x.float()) - wanted).norm() < 1e-3 * wanted.norm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newton_schulz, "symmetric", lambda *words, **named: mirrored(symmetric(*words, **named)))
        assert (orthogonalized(x.float()) - wanted).norm() < 1e-4 * wanted.norm()
        low = orthogonalized(x.float(), STEPS, torch.float16).double()  # whose rounding only the smallest values feel
        three = orthogonalized(x.float(), 3, torch.float16).double()
        patch.setattr(newton_schulz, "symmetric", once_rounded)
        two = orthogonalized(x.float(), 2, torch.float16).double()
    assert torch.linalg.svdvals(low).max() < 1.3 and (low - wanted).norm() < 0.12 * wanted.norm()
    for steps, low in ((2, two), (3, three)):
        fine = orthogonalized(x, steps)
        assert (
            torch.linalg.svdvals(low).max() < (1.5 if steps == 2 else 1.35)
            and (low - fine).norm() < (0.08 if steps == 2 else 0.06) * fine.norm()
        )


def mirrored(product: torch.Tensor) -> torch.Tensor:
    return product.tril() + product.tril(-1).mT


def once_rounded(x: torch.Tensor, y: Any = None, add: Any = None, alpha: Any = 1.0, beta: Any = 0.0, diagonal: Any = 0.0) -> torch.Tensor:
    """As the kernel has it, whose sums are whole before they are rounded."""
    alpha, beta, diagonal = (n[:, None, None].double() if isinstance(n, torch.Tensor) else n for n in (alpha, beta, diagonal))
    product = alpha * (x.double() @ (x if y is None else y).double().mT)
    product += diagonal * torch.eye(x.shape[1], dtype=torch.float64)
    return mirrored((product + (0.0 if add is None else beta * add.double())).to(x.dtype))


def test_roles_tell_what_is_a_hidden_matrix() -> None:
    model = small("model=hybrid")
    hidden = {name for name, p in model.named_parameters() if is_hidden_matrix(p)}
    kinds = {name.split(".", 2)[2] for name in hidden}
    assert kinds == {
        "mixer.in_proj.weight", "mixer.cell_weight", "mixer.out_proj.weight", "mixer.q_proj.weight", "mixer.k_proj.weight",
        "mixer.v_proj.weight", "mixer.o_proj.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight",
    }  # fmt: skip
    assert not {"embedding.weight", "head.weight"} & hidden
    every = [slab for stack in shapes_of(model).values() for slab in stack]
    for name in hidden:
        p = dict(model.named_parameters())[name]
        covered = sorted((s.first, s.first + s.rows * s.columns) for s in every if s.name == name)
        assert [a for a, _ in covered] == [0, *(b for _, b in covered[:-1])] and covered[-1][1] == p.numel()
    tied = small("model=transformer", "model.tie_embeddings=true")
    assert "embedding.weight" not in {s.name for stack in shapes_of(tied).values() for s in stack}


def test_fused_projections_are_the_matrices_that_lie_in_them() -> None:
    """The update of a parameter that holds several matrices equals, bit for bit, that of the matrices in parameters of their own."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = tag(nn.Parameter(torch.randn(28, 12)), splits=[16, 8, 4])
            self.batch = tag(nn.Parameter(torch.randn(2, 6, 18)), splits=[6] * 3)
            self.plain = nn.Parameter(torch.randn(16, 12))
            self.bias = tag(nn.Parameter(torch.randn(12)), "no_decay")

    class Apart(nn.Module):
        def __init__(self, fused: Fused) -> None:
            super().__init__()
            pieces = [*fused.rows.split([16, 8, 4]), *(part for matrix in fused.batch for part in matrix.split(6, 1)), fused.plain]
            self.pieces = nn.ParameterList(nn.Parameter(piece.detach().clone()) for piece in pieces)
            self.bias = tag(nn.Parameter(torch.zeros(12)), "no_decay")

    fused = Fused()
    apart = Apart(fused)
    one = MuonWithAdamW(fused, muon_lr=1e-2, **ADAMW)
    other = MuonWithAdamW(apart, muon_lr=1e-2, **ADAMW)
    for seed in range(3):
        with_gradients(fused, seed)
        grads = Apart.__new__(Apart)
        nn.Module.__init__(grads)
        together = Fused()
        together.rows.data, together.batch.data, together.plain.data = (p.grad.clone() for p in (fused.rows, fused.batch, fused.plain))
        for piece, gradient in zip(apart.pieces, Apart(together).pieces):
            piece.grad = gradient.detach().clone()
        one.step(), other.step()
    for piece, wanted in zip(Apart(fused).pieces, apart.pieces):
        assert torch.equal(piece, wanted)


def test_splits_that_do_not_add_up_are_named() -> None:
    with pytest.raises(ValueError, match=r"splits of w are \[3, 4\].*8 rows"):
        slabs("w", tag(nn.Parameter(torch.zeros(8, 4)), splits=[3, 4]))
    with pytest.raises(ValueError, match="batch of matrices has to be split into equal parts"):
        slabs("w", tag(nn.Parameter(torch.zeros(2, 4, 6)), splits=[2, 4]))


def reference_step(w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, lr: float, nesterov: bool, scale: float) -> None:
    """Muon as its author and Liu et al. write it, for one matrix, with the polynomials of ours."""
    m.mul_(0.95).add_(g, alpha=0.05)
    update = 0.05 * g + 0.95 * m if nesterov else m
    w.mul_(1 - lr * 0.1).sub_(lr * scale * exact(update))


@pytest.mark.parametrize("scale, nesterov", [("adamw", True), ("spectral", False)])
def test_a_step_is_muons_for_matrices_and_torchs_adamw_for_the_rest(scale: str, nesterov: bool) -> None:
    model = small("model=hybrid")
    other = copy.deepcopy(model)
    assert [roles(p) for p in other.parameters()] == [roles(p) for p in model.parameters()]
    muon = MuonWithAdamW(model, muon_lr=2e-2, nesterov=nesterov, scale=scale, **ADAMW)
    rest = [p for p in other.parameters() if not is_hidden_matrix(p)]
    plain = {n: p.detach().double() for n, p in other.named_parameters() if is_hidden_matrix(p)}
    momenta = {n: torch.zeros_like(p) for n, p in plain.items()}
    decayed = [p for p in rest if p.ndim > 1 and "no_decay" not in roles(p)]
    kept = [p for p in rest if not any(p is q for q in decayed)]
    groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"], eps=1e-8, weight_decay=0.1, fused=True)
    for seed in range(3):
        with_gradients(model, seed)
        for p, q in zip(model.parameters(), other.parameters()):
            q.grad = None if p.grad is None else p.grad.clone()
        muon.step(), adamw.step()
        for name, p in other.named_parameters():
            if name not in plain:
                continue
            w, g, m, sizes = plain[name], p.grad.double(), momenta[name], roles(p).get("splits")
            cut = [t.split(sizes or [len(t)]) if t.ndim == 2 else [q for s in t for q in s.split(sizes, 1)] for t in (w, g, m)]
            for w_, g_, m_ in zip(*cut):
                outputs, inputs = w_.shape if w.ndim == 2 else reversed(w_.shape)
                by = 0.2 * max(outputs, inputs) ** 0.5 if scale == "adamw" else max(1.0, outputs / inputs) ** 0.5
                reference_step(w_, g_, m_, 2e-2, nesterov, by)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        if name in plain:
            torch.testing.assert_close(p.double(), plain[name], atol=2e-5, rtol=1e-4)
        else:
            assert torch.equal(p, q), name


def test_a_skipped_step_leaves_weights_momentum_and_moments_alone() -> None:
    model = small("model=paragru")
    muon = MuonWithAdamW(model, muon_lr=1e-2, **ADAMW)
    with_gradients(model, 0)
    muon.step()
    before = copy.deepcopy(([p.detach() for p in model.parameters()], [m for _, m in muon.momenta()], list(muon.state.values())))
    with_gradients(model, 1)
    muon.skip_next = True
    muon.step()
    after = ([p.detach() for p in model.parameters()], [m for _, m in muon.momenta()], list(muon.state.values()))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    muon.skip_next = False
    muon.step()
    assert not torch.equal(next(m for _, m in muon.momenta()), before[1][0])


def test_shares_of_all_ranks_hold_every_slab_once_and_are_even() -> None:
    model = small("model=hybrid", "size.n_layers=8")
    for size in (1, 2, 3, 8, 64):
        ranks = [MuonWithAdamW(model, muon_lr=1e-2, rank=rank, size=size, **ADAMW) for rank in range(size)]
        owned = [slab for muon in ranks for slab, _ in muon.momenta()]
        assert sorted(map(repr, owned)) == sorted(repr(s) for stack in shapes_of(model).values() for s in stack)
        loads = [sum(m.numel() for _, m in muon.momenta()) for muon in ranks]
        matrices, most, _ = plan(model, size)
        assert sum(loads) == matrices and max(loads) == most
        assert size > 8 or max(loads) < 1.8 * matrices / size


Train = Callable[..., CompletedProcess[str]]
MUON = ["optim=muon", "checkpoint.every=2", "eval.tokens=64", "eval.sample_tokens=1"]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row and "lr" in row]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = newest(run)
    assert folder is not None
    stems = {stem: Weights(folder, stem) for stem in ("model", "optimizer")}
    return {f"{stem} {name}": weights.tensor(name) for stem, weights in stems.items() for name in [*weights.where, *weights.cut]}


def test_a_run_that_was_killed_goes_on_bit_for_bit_and_not_with_another_optimizer(train: Train, tmp_path: Path) -> None:
    done = train("whole", *MUON, "train.steps=5")
    assert done.returncode == 0, done.stderr
    words = ["experiment=smoke", "train.device=cpu", *MUON, "train.steps=5", f"run_dir={tmp_path / 'cut'}"]
    words.append(next(word for word in done.args if word.startswith("data.path=")))
    assert run_program(["-m", "tests.training.inject", *words], INJECT="kill 0 4").returncode != 0
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["step-00000002"]
    again = train("cut", *MUON, "train.steps=5")
    assert again.returncode == 0 and "resuming from" in again.stdout, again.stderr
    assert losses(tmp_path / "cut")[-3:] == losses(tmp_path / "whole")[-3:]
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    momenta = [name for name in whole if name.startswith("optimizer momentum.")]
    assert momenta and not any(name.replace("momentum.", "exp_avg.") in whole for name in momenta)
    other = train("cut", "train.steps=9")
    assert other.returncode == 2 and "holds the moments of optim=muon, not of adamw; go on with optim=muon, or begin" in other.stderr
    assert "Traceback" not in other.stderr
    begun = train("new", "train.steps=1", f"train.start_from={tmp_path / 'cut'}", "eval.tokens=64", "eval.sample_tokens=1")
    assert begun.returncode == 0, begun.stderr


def test_two_ranks_are_one_and_checkpoints_go_from_any_number_to_any(demo_shards: Path, tmp_path: Path) -> None:
    made = {}
    for ranks, words in ((1, ["save"]), (2, ["save"]), (4, ["load", "1", "2"]), (1, ["load", "2"]), (2, ["load", "2", "1"])):
        done = run_ranks(ranks, ["tests/training/muon_ranks.py", str(demo_shards), str(tmp_path), *words])
        assert done.returncode == 0, done.stdout + done.stderr
        made[ranks, words[0]] = json.loads((tmp_path / f"{words[0]}{ranks}.json").read_text())
    one, two = made[1, "save"], made[2, "save"]
    assert two["stage"] == 0 and two["losses"] == pytest.approx(one["losses"], abs=2e-6)
    assert max(two["owned"]) < 0.6 * one["owned"][0] and sum(two["owned"]) == one["owned"][0]
    for ranks in (1, 2, 4):
        for source, row in made[ranks, "load"].items():
            wanted = made[int(source), "save"]["losses"]
            assert row["differ"] == [] and row["steps"] == 2, (ranks, source)
            assert row["losses"] == wanted[2:] if int(source) == ranks else row["losses"] == pytest.approx(wanted[2:], abs=2e-6)


@pytest.mark.parametrize(
    "words, told",
    [
        (["deepspeed=zero2"], "optim=muon needs whole gradients.*set deepspeed.stage to 0 or 1, not 2"),
        (["deepspeed=zero3_offload"], "set deepspeed.stage to 0 or 1, not 3"),
        (["deepspeed.offload_optimizer=cpu"], "deepspeed.offload_optimizer=none"),
        (["optim.momentum=1"], "optim.momentum must be from 0 up to, but not, 1"),
        (["optim.update_scale=spectral"], "optim.muon_lr=0.02"),
        (["optim.update_scale=none"], "choose one of adamw, spectral"),
        (["optim.newton_schulz_steps=0"], "optim.newton_schulz_steps must be above zero"),
        (["optim.muon_lr=-1"], "optim.muon_lr must be above zero"),
        (["optim.kind=sgd"], "choose one of adamw, muon"),
    ],
)
def test_what_muon_cannot_do_is_a_sentence(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        checked(compose_config(["optim=muon", "data.path=nowhere", *words]))


def test_the_estimate_counts_one_momentum_a_matrix_and_a_share_of_it_a_rank() -> None:
    def held(world: int, *words: str) -> memory.Held:
        config = checked(compose_config([*SMALL, "model=transformer", *words]))
        with torch.device("meta"):
            return memory.held(config, LanguageModel(model_config(config, None)[0]), world)

    model = small("model=transformer")
    matrices, P = plan(model, 1)[0], sum(p.numel() for p in model.parameters())
    assert held(1).optimizer == 8 * P
    assert held(1, "optim=muon").optimizer == 8 * P - 4 * matrices == held(1, "optim=muon", "deepspeed=zero0").optimizer
    assert held(4, "optim=muon").optimizer == 8 * (P - matrices) + 4 * plan(model, 4)[1] < 8 * P - 6 * matrices
    assert held(4, "optim=muon").update > held(1).update
    config = checked(compose_config([*SMALL, "optim=muon", "dry_run=true"]))
    settings = model_config(config, None)[0]
    with torch.device("meta"):
        model = LanguageModel(settings)
    lines = memory.report(config, settings, model, [frozenset()] * settings.n_layers)
    assert (
        any("Adam's and Muon's moments" in line for line in lines)
        and len(lines[lines.index(next(x for x in lines if "by ZeRO" in x)) :]) == 3
    )


def test_every_group_follows_the_schedule_at_its_own_rate() -> None:
    muon = MuonWithAdamW(small("model=transformer"), muon_lr=0.02, **ADAMW)
    ratios = [group.get("lr_ratio", 1.0) for group in muon.param_groups]
    assert set(ratios[:-1]) == {1.0} and ratios[-1] == 2.0 and muon.adamw.param_groups[0] is muon.param_groups[0]
