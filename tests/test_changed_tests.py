"""Which tests a change concerns: found by imports, nearest first, within a time."""

from __future__ import annotations

from scripts.check.changed import ROOT, chosen, modules


def test_a_mixer_concerns_its_contract_and_not_the_tests_of_the_data() -> None:
    near, _ = chosen(["models/mixers/mamba2.py"], 1e9)
    assert near.index("tests/models/test_contract.py") < near.index("tests/hub/test_card.py")
    assert "tests/data/test_order_and_loader.py" not in near[:10]
    few, left = chosen(["models/mixers/mamba2.py"], 30.0)
    assert few and left and set(few) | set(left) == set(near)


def test_tests_that_name_what_was_changed_come_before_those_that_only_build_models() -> None:
    near, _ = chosen(["models/mixers/mamba2.py"], 1e9)
    for named in ("models/test_isolation", "models/test_against_transformers", "parallel/test_sequence", "hub/test_native_export"):
        assert near.index(f"tests/{named}.py") < near.index("tests/data/test_tokenizer.py"), named
    near, _ = chosen(["kernels/rotary/triton.py"], 1e9)
    assert near.index("tests/kernels/test_mixer_kernels.py") < near.index("tests/hub/test_native_export.py")
    assert near.index("tests/hub/test_native_export.py") < near.index("tests/kernels/test_ssd_kernels.py"), "another op's kernels"


def test_programs_fixtures_configs_and_tests_themselves_are_found() -> None:
    assert "tests/training/test_runs.py" in chosen(["train.py"], 1e9)[0], "by the fixture that runs it"
    assert "tests/data/test_prepare.py" in chosen(["data/prepare.py"], 1e9)[0], "by a string"
    assert "tests/models/test_contract.py" in chosen(["configs/mixer/swa.yaml"], 1e9)[0]
    assert chosen(["tests/training/test_schedule.py"], 0.0)[0] == ["tests/training/test_schedule.py"]
    assert chosen(["README.md"], 1e9) == ([], [])


def test_names_of_test_files_are_unique() -> None:
    """They stand on the path side by side, without packages."""
    names = [file.name for file in (ROOT / "tests").rglob("*.py") if file.name not in ("__init__.py", "conftest.py")]
    assert len(names) == len(set(names))
    assert all(name.count(".") for name in modules() if name.startswith("tests."))
