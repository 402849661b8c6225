"""What the mixers of docs/methods owe beside the contract: what is not finite stays in its document, and exported code has them as they are here."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import mixers
from models.config import ModelConfig
from models.hub.custom import write_code
from models.lm import LanguageModel
from scripts.check.methods import PAGES, ROOT, files_of
from scripts.check.whole_way import cases
from tests.mixers import mixer_configs

CORE = ("attention", "delta", "mamba2", "rnn")  # tested elsewhere
CONFIGS: dict[str, dict[str, Any]] = {name: mapping for name, mapping in mixer_configs().items() if mapping["type"] not in CORE}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_finite_stays_in_its_document(name: str) -> None:
    torch.manual_seed(0)
    mixer = mixers.build(CONFIGS[name], 32, 0)
    mixer.init_weights(0.1, 0)
    x, segments = torch.randn(2, 24, 32), torch.repeat_interleave(torch.arange(1, 4), torch.tensor([7, 9, 8])).expand(2, -1)
    bad, others = x.clone(), segments[0] != 2
    bad[:, 9], bad[:, 10] = torch.nan, torch.inf
    y = mixer(x, None, segments)[0]
    found = mixer(bad, None, segments)[0]
    torch.testing.assert_close(found[:, others], y[:, others])
    assert found[:, 9].isnan().all()
    first, state = mixer(bad[:, :12], mixer.init_state(2), segments[:, :12])
    rest, _ = mixer(bad[:, 12:], state, segments[:, 12:])
    torch.testing.assert_close(torch.cat([first, rest], 1)[:, others], y[:, others], atol=1e-5, rtol=1e-4)


def test_exported_code_has_the_same_mixers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that is written beside an exported model's weights, without this project: outputs and states."""
    (tmp_path / "exported_methods").mkdir()
    write_code(ModelConfig(269, 32, len(CONFIGS), list(CONFIGS), CONFIGS, d_ff=0), tmp_path / "exported_methods")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        code = importlib.import_module("exported_methods.modeling_everywhen")
        for mapping in CONFIGS.values():
            ours = mixers.build(mapping, 32, 0)
            ours.init_weights(0.2, 0)
            Settings, Mixer = code.MIXERS[mapping["type"]]
            theirs = Mixer(Settings(**{key: value for key, value in mapping.items() if key != "type"}), 32, 0)
            theirs.load_state_dict(ours.state_dict())
            x, a, b = torch.randn(2, 9, 32), ours.init_state(2), theirs.init_state(2)
            for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
                (y, a), (found, b) = ours(x[:, part], a), theirs(x[:, part], b)
                torch.testing.assert_close(found, y)
    finally:
        for module in [n for n in sys.modules if n.startswith("exported_methods")]:
            del sys.modules[module]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tokens_change_nothing(name: str) -> None:
    model = LanguageModel(ModelConfig(64, 32, 1, ["m"], {"m": CONFIGS[name]}))
    model.init_weights(0)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    none, segments = ids[:, :0], torch.zeros(2, 0, dtype=torch.int32)
    assert model(none, labels=none, segment_ids=segments).loss_sum == model(none, labels=none).loss_sum == 0
    model.eval()
    with torch.no_grad():
        before = model(ids[:, :4], state=model.init_state(2)).state
        after = model(none, state=before, segment_ids=segments).state
        torch.testing.assert_close(model(ids[:, 4:], state=after).logits, model(ids[:, 4:], state=before).logits, rtol=0, atol=0)


def test_the_whole_way_is_gone_by_every_mixer_of_the_pages() -> None:
    """python -m scripts.check.whole_way: ZeRO-1 on two ranks, evaluation, text, export."""
    words = next(word for word in cases("")["all mixers"] if word.startswith("model.pattern="))
    named = words.removeprefix("model.pattern=[").removesuffix("]").split(",")
    assert {CONFIGS[name]["type"] for name in named if name} == {mapping["type"] for mapping in CONFIGS.values()} - {"m2rnn"}


def test_no_other_test_imports_what_a_method_consists_of() -> None:
    """So that a method's files can be taken away (python -m scripts.check.methods tries it)."""
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    found = []
    for page in sorted((ROOT / PAGES).glob("*.md")):
        files = files_of(page)
        for module in (file.removesuffix(".py") for file in files if file.endswith(".py")):
            package, name = module.replace("/", ".").rsplit(".", 1)
            line = re.compile(rf"^(?:from {re.escape(package)} import .*\b{name}\b|(?:from|import) {re.escape(package)}\.{name}\b)", re.M)
            others = {other: text for other, text in texts.items() if other not in files}
            found += [f"{other} needs {module}" for other, text in others.items() if line.search(text)]
            if package.startswith("models."):  # a kind that a config names, too, unless it is skipped where it is away
                kind, skips = f'"type": "{name}"', f'importorskip("{package}.{name}")'
                found += [f"{other} builds {module}" for other, text in others.items() if kind in text and skips not in text]
    assert not found


def test_no_page_links_to_code_of_a_method_but_its_own() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    linked = {(page, (page.parent / link).resolve()) for page in pages for link in re.findall(r"\]\(([^)#:]+\.py)", page.read_text())}
    own = {(page, (ROOT / file).resolve()) for page in (ROOT / PAGES).glob("*.md") for file in files_of(page)}
    code = {file for _, file in own}
    assert linked and not [f"{page} links to {file}" for page, file in linked - own if file in code]
