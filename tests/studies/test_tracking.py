"""The study of state tracking at equal parameters: what its models have, its curriculum, and its table."""

from typing import Any

from data.synthetic import build_task
from scripts.studies.cells import EQUAL, HARD, TASKS, build_model, settings_of, stages_of
from scripts.studies.tracking import EQUAL_TASKS, arguments, table


def test_models_of_the_equal_study_have_equal_parameters() -> None:
    counts = {name: sum(p.numel() for p in build_model(layers, 6, None).parameters()) for name, layers in EQUAL.items()}
    assert max(counts.values()) < 1.12 * min(counts.values()), counts


def test_large_groups_are_learnt_from_short_words_on_where_parameters_are_equal() -> None:
    values = arguments(["equal=true"])
    assert values["tasks"] == EQUAL_TASKS.split(",") and values["mixers"] == list(EQUAL)
    hard, plain = (settings_of(task, "dense_gru", values) for task in ("A5", "S3"))
    assert {t for t in TASKS if "shortest" in settings_of(t, "slstm", values)} == HARD
    lengths = [stages_of(build_task(s["task"]), 100, shortest=s.get("shortest", 8)) for s in (hard, plain)]
    assert lengths == [[3, 6, 12, 25, 50, 100], [12, 25, 50, 100]]
    assert settings_of("A5", "paragru", arguments([]))["lr"] > hard["lr"]


def test_the_table_says_what_ran_out_of_time() -> None:
    values = arguments(["equal=true", "tasks=S3", "mixers=slstm,paragru"])

    def cell(mixer: str, seed: int, accuracy: float, ended: str) -> dict[str, Any]:
        lengths = [{"length": n, "accuracy": accuracy, "chance": 0.17} for n in (50, 100, 200, 400, 800)]
        return {
            "task": "S3", "mixer": mixer, "seed": seed, "accuracy": accuracy, "ended": ended, "lengths": lengths, "parameters": 31000,
        }  # fmt: skip

    cells = [cell("slstm", 0, 1.0, "solved"), cell("slstm", 1, 0.9, "time"), cell("paragru", 0, 0.4, "steps")]
    rows = table(cells, values).splitlines()
    assert "| slstm | 31,000 | 100.0 (95.0 of 2) → 100.0, 100.0, 100.0; ran out of time: 1 of 2 |" in rows
    assert "| paragru | 31,000 | 40.0 (40.0 of 1) → 40.0, 40.0, 40.0 |" in rows and "| chance | | 17 |" in rows
