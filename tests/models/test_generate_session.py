"""Sessions: a reload goes on exactly, questions leave the document as it was, and bad files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.lm import LanguageModel
from models.sampling import Sampling
from models.session import Session, left_pad
from tests.models.test_generate import HYBRID, MIXERS, folder, prompts, run, small  # noqa: F401
from training.errors import UserError

DRAW = Sampling(0.9, 30, repetition_penalty=1.2)


@pytest.mark.parametrize("name", ["attention", "window", "mamba2", "paragru", "paralstm", "delta", "bare"])
def test_a_reloaded_session_goes_on_exactly(name: str, tmp_path: Path) -> None:
    model = small([name, "paragru"] if name != "paragru" else HYBRID)
    ids_BT, lengths = left_pad(prompts(9, 4), 0)
    whole = Session(model, ids_BT, lengths, seed=3)
    expected = torch.cat([whole.generate(11, DRAW), whole.generate(9, DRAW)], 1)
    first = Session(model, ids_BT, lengths, seed=3)
    begun = first.generate(11, DRAW)
    first.save(tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    again = Session.load(tmp_path / "s", small([name, "paragru"] if name != "paragru" else HYBRID))
    rest = again.generate(9, DRAW)
    assert torch.equal(torch.cat([begun, rest], 1), expected)
    logits = [s._feed(s.ids_BT.shape[1]) for s in (whole, again)]
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_questions_start_from_the_same_document(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.session.CHUNK", 7)
    model, (document, one, two) = small([name, name]), prompts(24, 3, 6)
    read = Session(model, torch.tensor([document])).read()
    for question in (one, two, one):
        new = read.copy().append(torch.tensor([question])).generate(8, Sampling(0))
        ids = [*document, *question]
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert new[0].tolist() == ids[-8:]


def test_torn_foreign_and_other_models_sessions_are_refused(tmp_path: Path) -> None:
    model = small(HYBRID)
    path = tmp_path / "s"
    Session(model, torch.tensor([[1, 2, 3]])).read().save(path)
    other = LanguageModel(model.config)
    other.init_weights(1)
    data = path.read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "torn").write_bytes(data[:length])
        with pytest.raises(UserError, match="cannot be read"):
            Session.load(tmp_path / "torn", model)
    for wrong in (other, small(["mamba2"])):
        with pytest.raises(UserError, match="another model"):
            Session.load(path, wrong)
    with pytest.raises(UserError, match="cannot be read"):
        Session.load(tmp_path / "none", model)
    with pytest.raises(UserError, match="cannot be written"):
        Session(model, torch.tensor([[1, 2]])).save(tmp_path / "no" / "s")


def test_the_command_reads_once_and_asks_many(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    text, session, common = (
        "A document of some length. " * 5,
        tmp_path / "d.session",
        (f"checkpoint={folder}", "max_new_tokens=8", "temperature=0"),
    )
    (tmp_path / "d.txt").write_text(text)
    (tmp_path / "q.txt").write_text("Who?\nWhen?\n")
    assert run(capsys, *common, f"document={tmp_path / 'd.txt'}", f"save={session}")[:2] == (0, "")
    status, out, _ = run(capsys, *common, f"resume={session}", f"prompts={tmp_path / 'q.txt'}")
    expected = "".join(run(capsys, *common, f"prompt={text}{q}")[1].removeprefix(text) for q in ("Who?", "When?"))
    assert status == 0 and out == expected
    half = tmp_path / "half"
    begun = run(capsys, *common, "prompt=It was", f"save={half}")[1].rstrip("\n")
    status, rest, _ = run(capsys, *common, f"resume={half}")
    assert status == 0 and begun.startswith("It was") and rest
    status, _, err = run(capsys, *common, "prompt=a", f"save={tmp_path / 'none' / 's'}")
    assert status == 2 and "make the folder first" in err
    status, _, err = run(capsys, *common, f"resume={session}", "document=x")
    assert status == 2 and "not both" in err
    status, _, err = run(capsys, *common, f"resume={folder / 'model.safetensors'}")
    assert status == 2 and "holds no session" in err


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_steps_of_a_decoder_leave_the_same_session(name: str) -> None:
    model = small([name, "window"])
    ids_BT, lengths = left_pad(prompts(9, 4), 0)
    plain, stepped = (Session(model, ids_BT, lengths, seed=3) for _ in range(2))
    for graph in (True, False, True):  # each goes on from what the other way left
        given, expected = stepped.generate(6, DRAW, graph=graph), plain.generate(6, DRAW, graph=False)
        assert torch.equal(given, expected) and stepped.read_to == plain.read_to
    question = torch.tensor(prompts(5, 5))
    logits = [s.append(question).read()._feed(s.ids_BT.shape[1]) for s in (plain, stepped)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
