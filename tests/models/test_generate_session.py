"""Sessions: a reload goes on exactly, questions leave the document as it was, and bad files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sources import Source
from models.decode import cast
from models.lm import LanguageModel
from models.sampling import Sampling
from models.session import Session, left_pad
from scripts.generate import DEFAULTS, Writer
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


@pytest.mark.parametrize("at", ["first token", "later", "callback"])
def test_a_session_that_broke_off_refuses_to_go_on(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state has read tokens that its ids do not hold; a copy of before goes on as if nothing had been."""
    model, ids_BT = small(HYBRID), torch.tensor(prompts(9))
    expected = Session(model, ids_BT, seed=3).generate(4, DRAW)
    session = Session(model, ids_BT, seed=3).read()
    kept = session.copy()
    whole = type(model).forward

    def broken(self: LanguageModel, ids: torch.Tensor, **more: Any) -> Any:
        output = whole(self, ids, **more)
        assert output.logits is not None
        output.logits[:] = torch.nan if session.read_to >= (9 if at == "later" else 0) else output.logits
        return output

    def interrupted(token_B: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if at == "callback" else UserError):
        if at != "callback":
            patch.setattr(type(model), "forward", broken)
        session.generate(4, DRAW, on_token=interrupted if at == "callback" else None)
    uses: list[Callable[[], Any]] = [
        lambda: session.generate(4, DRAW),
        session.read,
        session.copy,
        lambda: session.append(ids_BT),
        lambda: session.save(tmp_path / "s"),
    ]
    for use in uses:
        with pytest.raises(UserError, match="^The session broke off while it generated"):
            use()
    assert torch.equal(kept.generate(4, DRAW), expected) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("bad", ["behind its end", "before it", "at the last token"])
def test_logits_behind_the_end_of_a_row_do_not_count(bad: str, graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 0 ends with its second token and is fed what fills it from then on; NaN before that is told, whether or not it stays."""
    model, calls = small(HYBRID), 0
    whole = type(model).forward

    def broken(self: LanguageModel, ids: torch.Tensor, **more: Any) -> Any:
        nonlocal calls
        output = whole(self, ids, **more)
        assert output.logits is not None
        calls += 1
        if (calls == 2 and bad == "before it") or (calls > 2 and bad == "behind its end"):
            output.logits[0] = torch.nan
        if calls == 5 and bad == "at the last token":
            output.logits[1] = torch.nan
        return output

    session = Session(model, torch.tensor(prompts(6, 6))).read()
    monkeypatch.setattr(type(model), "forward", broken)
    drawn: list[torch.Tensor] = []

    def told() -> torch.Tensor:
        return session.generate(5, DRAW, stop_when=lambda row, token: row == 0 and len(drawn) == 2, on_token=drawn.append, graph=graph)

    if bad == "behind its end":
        assert told().shape == (2, 5)
    else:
        with pytest.raises(UserError, match="^The logits are not finite: "):
            told()


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
    with pytest.raises(UserError, match="another precision"):
        Session.load(path, cast(small(HYBRID), torch.bfloat16))
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


@pytest.mark.parametrize("written", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_document_is_the_text_that_data_prepare_reads(folder: Path, tmp_path: Path, written: str) -> None:  # noqa: F811
    text = "Two lines,\r\nof which\rone — ends\n otherwise.\n"
    (tmp_path / "d.txt").write_bytes(text.encode(written))
    values = {**DEFAULTS, "checkpoint": str(folder), "device": "cpu"}
    assert Writer({**values, "document": str(tmp_path / "d.txt")}).document == text == next(iter(Source(str(tmp_path / "d.txt"))))
    assert Writer({**values, "prompts": str(tmp_path / "d.txt")}).prompts == ["Two lines,", "of which", "one — ends", " otherwise."]


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
