"""Attention converted to recurrent mixers: what is copied where, what a student learns from a teacher, and that its start is worth something."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models

from data.errors import UserError
from data.tokenizer import byte_tokenizer
from evals.adapters.own import OwnAdapter
from evals.cures.hooks import scan_hook
from models.config import ModelConfig
from models.convert import converted, sizes_of, targets
from models.lm import LanguageModel
from scripts.convert import DEFAULTS, problems_of, start_of
from training.distill import Distillation, divergence

IDS = torch.randint(48, (2, 20), generator=torch.Generator().manual_seed(0))


def teacher_of(n_layers: int = 2, **attention: Any) -> LanguageModel:
    mixer = {"type": "attention", "n_heads": 4, "n_kv_heads": 2, **attention}
    model = LanguageModel(
        ModelConfig(vocab_size=48, d_model=32, n_layers=n_layers, pattern=["a"], mixers={"a": mixer}, d_ff=64, init_std=0.1)
    )
    model.init_weights(0)
    return model.eval()


@pytest.mark.parametrize("target", targets())
def test_everything_but_the_converted_layers_is_the_teachers(target: str) -> None:
    teacher = teacher_of(3)
    student = converted(teacher, [1], target).eval()
    theirs, ours = teacher.state_dict(), student.state_dict()
    same = [name for name in theirs if not name.startswith("blocks.1.mixer.")]
    assert len(same) == len([n for n in ours if not n.startswith("blocks.1.mixer.")]) and all(torch.equal(ours[n], theirs[n]) for n in same)
    assert torch.equal(ours["blocks.1.mixer.out_proj.weight"], theirs["blocks.1.mixer.o_proj.weight"])
    assert student(IDS).logits.isfinite().all() and not torch.equal(student(IDS).logits, teacher(IDS).logits)
    assert torch.equal(converted(teacher, [], target).eval()(IDS).logits, teacher(IDS).logits)


@torch.no_grad()
def test_mamba2_begins_with_the_scores_of_the_attention() -> None:
    """With a decay of one and steps of one the mixing matrix is silu(q) silu(k) of the teacher's projections, and what is mixed silu(v)."""
    teacher = teacher_of(1)
    student = converted(teacher, [0], "mamba2").eval()
    mixer: Any = student.blocks[0].mixer
    mixer.in_proj.weight[-mixer.H :] = 0
    mixer.dt_bias.fill_(float(torch.tensor(1.0).expm1().log()))
    mixer.A_log.fill_(-40)
    seen: list[Any] = []

    def look(layer: int, scan: Any, run: Any) -> Any:
        seen.append(scan)
        return run(scan)

    with scan_hook(adapter := OwnAdapter(student, None, "s", "s"), look):
        adapter.advance(IDS, adapter.start(2))
    attention: Any = teacher.blocks[0].mixer
    x = teacher.blocks[0].mixer_norm(teacher.embedding(IDS))
    q, k, v = (F.silu(p(x)).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    wanted = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).tril()
    (scan,) = seen
    assert (scan.dt * scan.A).abs().max() < 1e-6
    mixed = scan.C.transpose(1, 2) @ (scan.dt[..., None] * scan.B).transpose(1, 2).transpose(-1, -2)
    torch.testing.assert_close(mixed.tril(), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scan.x.transpose(1, 2), v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_delta_rule_and_cells_read_what_the_attention_read() -> None:
    teacher = teacher_of(1)
    attention: Any = teacher.blocks[0].mixer
    heads = [p.weight.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32) for p in (attention.k_proj, attention.v_proj)]
    delta: Any = converted(teacher, [0], "delta").blocks[0].mixer
    for rows, wanted in zip(delta.in_proj.weight[:96].split(32), (attention.q_proj.weight, *heads)):
        assert torch.equal(rows, wanted)
    cell: Any = converted(teacher, [0], "paragru").blocks[0].mixer
    u = torch.randn(1, 3, 32)
    candidate = cell._project(u)[:, :, cell.cell.pre.index("c")].flatten(2)
    torch.testing.assert_close(candidate, u)
    assert torch.equal(cell.in_proj.weight, heads[1])


@pytest.mark.parametrize("target", ["mamba2", "delta"])
def test_the_size_of_what_new_mixers_put_out_can_be_smaller(target: str) -> None:
    teacher = teacher_of()
    whole, tenth = (converted(teacher, [0], target, scale=scale).state_dict() for scale in (1.0, 0.1))
    changed = [name for name, value in whole.items() if not torch.equal(value, tenth[name])]
    assert changed == ["blocks.0.mixer.norm.weight"]
    torch.testing.assert_close(tenth[changed[0]], 0.1 * whole[changed[0]])
    assert problems_of({**DEFAULTS, "checkpoint": "a", "out": "b", "scale": 0.0}) == ["scale must be above zero and at most 10, not 0."]


@torch.no_grad()
@pytest.mark.parametrize("target", ["mamba2", "delta"])
def test_outputs_begin_with_the_size_that_the_attentions_have_on_a_text(target: str) -> None:
    teacher = teacher_of()
    (size,) = sizes_of(teacher, [1], IDS).values()
    attention, seen = teacher.blocks[1].mixer, []
    hook = attention.register_forward_hook(lambda m, given, made: seen.append(made[0]))
    wanted = teacher(IDS).logits
    hook.remove()
    handed_on = torch.linalg.solve(attention.o_proj.weight, seen[0].flatten(0, 1).T)
    torch.testing.assert_close(size, handed_on.square().mean(1).sqrt(), rtol=1e-3, atol=1e-6)
    assert torch.equal(teacher(IDS).logits, wanted), "the teacher stays as it was"
    norm = converted(teacher, [1], target, scale=0.5, sizes={1: size}).blocks[1].mixer.norm.weight
    heads = size if target == "mamba2" else size.view(4, 8).square().mean(0).sqrt()
    torch.testing.assert_close(norm, 0.5 * heads)


def test_a_text_is_read_as_everywhere(tmp_path: Path) -> None:
    words = "".join(f"line {i} of a text\n" for i in range(40))
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(words.encode()))
    assert torch.equal(start_of(str(tmp_path / "a.txt"), byte_tokenizer()), start_of(str(tmp_path / "a.txt.gz"), byte_tokenizer()))
    (tmp_path / "a.png").write_bytes(b"\x89PNG" * 200)
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1") * 200)
    for name, why in (("a.png", "not read"), ("latin.txt", "not UTF-8"), ("nosuch.txt", "nothing to read")):
        with pytest.raises(UserError, match=why):
            start_of(str(tmp_path / name), byte_tokenizer())
    with pytest.raises(UserError, match="no token for a part of the text"):
        start_of(str(tmp_path / "a.txt"), Tokenizer(models.WordLevel({"</s>": 0, "line": 1})))


def test_what_cannot_be_converted_is_a_sentence() -> None:
    with pytest.raises(UserError, match="Layer 5 is no attention; these are 0, 1"):
        converted(teacher_of(), [5], "mamba2")
    with pytest.raises(UserError, match="choose one of mamba2, delta"):
        converted(teacher_of(), [0], "transformer")
    with pytest.raises(UserError, match="choose delta instead"):
        converted(teacher_of(head_dim=12), [0], "mamba2")


def test_the_divergence_is_that_of_the_formula_and_teaches_the_student_alone() -> None:
    teacher, labels = teacher_of(), IDS.roll(-1, 1).masked_fill(torch.arange(20) % 3 == 0, -100)
    student = converted(teacher, [0], "delta").train()
    student.beside = Distillation(teacher, kl=2.0, next_token=0.5, until=lambda: 3, chunk=7)
    student.begin_step(0, 2)
    output = student(IDS, labels=labels)
    p, q = (m(IDS).logits.double().log_softmax(-1) for m in (teacher, student))
    wanted = 2 * (p.exp() * (p - q)).sum(-1)[labels != -100].sum() + 0.5 * F.nll_loss(
        q[labels != -100], labels[labels != -100], reduction="sum"
    )
    torch.testing.assert_close((output.loss_sum + output.z_loss_sum).double(), wanted, rtol=1e-5, atol=1e-4)
    (output.loss_sum + output.z_loss_sum).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters()) and all(p.grad is not None for p in student.parameters())
    assert not [name for name in student.state_dict() if "teacher" in name]
    student.begin_step(0, 3)
    assert student(IDS, labels=labels).z_loss_sum == 0, "afterwards the next-token loss alone"
    cool_p, cool_q = ((x / 2).log_softmax(-1) for x in (p, q))
    torch.testing.assert_close(divergence(p, q, 2.0), 4 * F.kl_div(cool_q, cool_p, log_target=True, reduction="sum"))


def induction(rows: int, draw: torch.Generator) -> torch.Tensor:
    """Rows in which 8 symbols come twice in the same order."""
    x = torch.stack([torch.randperm(48, generator=draw)[:8] for _ in range(rows)])
    return torch.cat([x, x], 1)


def learn(model: LanguageModel, steps: int, lr: float, seed: int) -> float:
    """The loss on the second halves of new rows after `steps` steps."""
    draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    model.train()
    for step in range(steps + 1):
        model.begin_step(0, step)
        ids = induction(32 if step < steps else 256, draw)
        output = model(ids[:, :-1], labels=ids[:, 1:].clone().index_fill_(1, torch.arange(7), -100))
        loss = output.loss_sum / output.token_count
        if step < steps:
            ((output.loss_sum + output.z_loss_sum) / output.token_count).backward()
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


def test_a_student_that_begins_from_the_attention_is_there_sooner_than_one_that_begins_anew() -> None:
    teacher = teacher_of()
    assert learn(teacher, 300, 5e-3, 1) < 0.1
    after = {}
    for copied in (True, False):
        student = converted(teacher, [0], "delta", copy_attention=copied)
        student.beside = Distillation(teacher, kl=1.0, next_token=0.0, until=lambda: 1000)
        after[copied] = learn(student, 20, 2e-3, 2)
    assert after[True] < 0.5 and after[False] > after[True] + 1, after
