"""From a checkpoint to a converted folder to a student with its teacher, as the two commands of the page do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import load_model
from models.config import ModelConfig
from models.hub.importing import load_into, resolved
from models.lm import LanguageModel
from scripts import convert
from scripts.studies.conversion import Conversion
from scripts.studies.conversion import main as study
from scripts.studies.text import Text
from tests.hub.test_native_export import ATTENTION, checkpoint
from training.config.cli import checked, compose_config
from training.distill import begin
from training.errors import UserError

CPU: Any = SimpleNamespace(device=torch.device("cpu"))
IDS = torch.randint(200, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_becomes_a_student_with_its_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ModelConfig(vocab_size=269, d_model=48, n_layers=3, pattern=["a"], mixers={"a": ATTENTION}, tie_embeddings=True)
    teacher, out = checkpoint(tmp_path / "teacher", settings), tmp_path / "hybrid"
    words = [f"checkpoint={teacher}", f"out={out}", "to=delta"]
    assert convert.main([*words, "layers=half"]) == 0 and convert.main([*words, "layers=half"]) == 2
    assert "exists already" in capsys.readouterr().err
    (text := tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    assert convert.main([f"checkpoint={teacher}", f"out={tmp_path / 'sized'}", "to=delta", f"text={text}"]) == 0
    sized, plain = (load_model(folder)[0].state_dict() for folder in (tmp_path / "sized", out))
    assert [name for name in plain if not torch.equal(plain[name], sized[name])] == [f"blocks.{i}.mixer.norm.weight" for i in (0, 2)]
    assert convert.main([f"checkpoint={teacher}", f"out={tmp_path / 'x'}", "text=none.txt"]) == 2
    assert "There is nothing to read at text=none.txt" in capsys.readouterr().err
    config = checked(
        compose_config([f"model=hf:{out}", f"distill.teacher={teacher}", "distill.steps=0.5", "train.steps=10", "data.path=x"])
    )
    model = ModelConfig.from_dict({**resolved(config.model), "vocab_size": 269})
    assert model.pattern == ["delta_for_a", "a", "delta_for_a"]
    student = LanguageModel(model)
    load_into(out, student, verify=False)
    original, tokenizer, _ = load_model(teacher)
    assert torch.equal(student.blocks[1].mixer.q_proj.weight, original.blocks[1].mixer.q_proj.weight)
    begin(config, student, CPU, tokenizer)
    student.train()
    added = []
    for step in (4, 5):
        student.begin_step(0, step)
        added.append(float(student(IDS, labels=IDS).z_loss_sum.detach()))
    assert added[0] != 0 and added[1] == 0 and student.varies
    first: Any = student.blocks[0].mixer
    first.prompt = 4  # as of a mixer that reads a prompt twice, which the teacher does not
    with pytest.raises(UserError, match="prompts of 0 tokens twice and the student of 4"):
        begin(config, student, CPU, tokenizer)
    other = LanguageModel(ModelConfig(vocab_size=300, d_model=32, n_layers=1))
    with pytest.raises(UserError, match="has other tokens than the student"):
        begin(config, other, CPU, tokenizer)
    tensors = load_file(teacher / "model.safetensors")
    next(iter(tensors.values())).view(-1)[-1] = torch.nan
    save_file(tensors, teacher / "model.safetensors")
    assert convert.main([f"checkpoint={teacher}", f"out={tmp_path / 'x'}", "to=delta"]) == 2
    assert "would hold values that are not finite" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_study_learns_from_the_teacher_first_and_says_after_how_many_tokens(demo_shards: Path) -> None:
    text = Text(demo_shards, 24, torch.device("cpu"))
    teacher = LanguageModel(ModelConfig(text.vocab_size, d_model=48, n_layers=2, pattern=["a"], mixers={"a": ATTENTION}))
    teacher.init_weights(0)
    study = Conversion(teacher, text, rows=2, windows=4, kl=0.5)
    row = study.run("delta", "copied", 3e-3, 0, tokens=8 * 48)
    assert [n for n, _ in row["held_out"]] == [0, 48, 96, 192, 384] and row["held_out"][-1][1] < row["held_out"][0][1]
    assert row["held_out"] == study.run("delta", "copied", 3e-3, 0, tokens=8 * 48)["held_out"]
    assert study.run("delta", "copied", 3e-3, 0, 8 * 48, ends=lambda: True)["cut_at"] == 48
    assert study.layers == [0] and study.run("delta", "anew", 3e-3, 0, 48)["held_out"][0] != row["held_out"][0]


def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["to=conformer", "layers=first"]) == 2
    told = capsys.readouterr().err
    assert "checkpoint=DIR" in told and "out=DIR" in told and "choose one of mamba2" in told and "half, all" in told
    with pytest.raises(UserError, match="distill.teacher reads whole ones"):
        checked(compose_config(["distill.teacher=x", "parallel.sequence=2", "data.path=x"]))
    with pytest.raises(UserError, match="distill.kl and distill.next_token are both zero"):
        checked(compose_config(["distill.teacher=x", "distill.kl=0", "data.path=x"]))


@pytest.mark.parametrize("words", [["--targets", "mamba3"], ["--rates", "1e-3;1e-2"], ["--kl", "1.5"]])
def test_a_study_of_what_is_not_there_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        study([f"--{name}={tmp_path / name}" for name in ("teacher", "data", "out")] + words)
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err and not list(tmp_path.iterdir())
