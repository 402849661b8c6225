"""The suites: which measurements each consists of. An item knows all that its result depends on, and runs when it is asked to (runner.py).

| suite | items |
|---|---|
| perplexity | documents, loss by position on prose |
| quick | these and passkey, states, remembrance, at a few training lengths |
| long_context | all of them further out and on constant and random tokens, more retrieval tasks, cures |
| state_tracking | accuracy by length on the generated task that the model was trained on |
| harness | tasks of lm-evaluation-harness |
| all | long_context and harness |
| a file of evals/suites/extra | its measurement |

A model that was trained on a generated task knows no text: it gets that task in every suite but harness. Legend: R rows, L tokens of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data.synthetic import build_task
from evals.adapters.base import ItemError
from evals.cures import options as cures
from evals.inputs.tasks import Task
from evals.inputs.texts import Corpus, tokenised
from evals.measures.documents import document_perplexity
from evals.measures.harness import TASKS, run_task, task_hash
from evals.measures.position import collapse, position_curve
from evals.measures.retrieval import grid
from evals.measures.states import effective_remembrance, state_curve
from evals.measures.tracking import accuracy_by_length, default_lengths
from evals.suites import extra
from evals.suites.subject import Subject

OnProgress = Callable[[int, int], None]  # (done, total)


@dataclass
class Item:
    """One measurement. name: unique in a suite; settings: all that the result depends on beside the model; run(progress): the result."""

    name: str
    kind: str  # documents | position | retrieval | states | remembrance | cure | tracking | harness | extra: what the report draws
    settings: dict[str, Any]
    run: Callable[[OnProgress], dict[str, Any]]


def items_of(subject: Subject) -> list[Item]:
    """The items of the suite that the subject's settings name, in the order they are run; of these the ones that `only` names."""
    s, suite = subject.settings, subject.settings.suite
    items: list[Item] = []
    if suite == "state_tracking" or subject.task and suite not in ("harness", *extra.available()):
        items.append(tracking_item(subject))
    else:
        if suite in ("perplexity", "quick", "long_context", "all"):
            items += documents_items(subject) + position_items(subject)
        if suite in ("quick", "long_context", "all"):
            items += states_items(subject) + retrieval_items(subject)
        if suite in ("long_context", "all") or (suite == "quick" and s.cures not in ("default", "none")):
            items += cure_items(subject)
        if suite in ("harness", "all"):
            items += harness_items(subject)
    if suite in extra.available():
        items.append(extra_item(subject, suite))
    parts = s.only.split(",")
    return [item for item in items if any(part in item.name for part in parts)]


def _settings(subject: Subject, prose: bool, **more: Any) -> dict[str, Any]:
    """Settings of an item; of one that reads prose, the hash of the text as well."""
    s = subject.settings
    text = {"text": subject.text_hash()} if prose else {}
    return {"T": subject.T, "seed": s.seed, "chunk": s.chunk, **text, **more}


def extra_item(subject: Subject, suite: str) -> Item:
    """The measurement of a file of evals/suites/extra."""
    file = extra.load(suite)
    return Item(suite, "extra", _settings(subject, True, **file.settings(subject)), lambda progress: file.measure(subject, progress))


def tracking_item(subject: Subject) -> Item:
    """Accuracy by length on the generated task of the model's training."""
    s = subject.settings
    sequences = s.sequences or (200 if subject.quick else 1000)

    def run(progress: OnProgress) -> dict[str, Any]:
        if not subject.task:
            raise ItemError(
                f"{subject.adapter.folder} was not trained on a generated task; train one: python train.py experiment=synthetic/parity"
            )
        task = build_task(subject.task)
        lengths = s.lengths or default_lengths(subject.T, task)
        result = accuracy_by_length(
            cast(Any, subject.adapter.model),
            task,
            lengths,
            train_length=subject.T,
            sequences=sequences,
            seed=s.seed,
            batch=max(64, s.batch),
            chunk=min(s.chunk, 512),
            precision=subject.adapter.precision,
            on_progress=lambda row: progress(lengths.index(row["length"]) + 1, len(lengths)),
        )
        shown = ", ".join(
            f"{r['length']:,}: {100 * r['accuracy']:.1f} %" if "accuracy" in r else f"{r['length']:,}: -" for r in result["lengths"]
        )
        return {**result, "sequences": sequences, "summary": f"{result['task']['name']} by length: {shown}"}

    return Item("state_tracking", "tracking", {"lengths": s.lengths, "sequences": sequences, "seed": s.seed, "task": subject.task}, run)


def documents_items(subject: Subject) -> list[Item]:
    """Perplexity and bits per byte of documents, each read from its beginning."""
    s = subject.settings
    count, characters = s.rows or (16 if subject.quick else 64), subject.common.characters(s.train_length, s.max_length)

    def run(progress: OnProgress) -> dict[str, Any]:
        adapter, corpus = subject.adapter, subject.common.corpus
        coder = adapter.need_coder()
        parts = corpus.excerpts(count, characters)
        text = tokenised(Corpus(corpus.name, parts), adapter)
        limit = adapter.position_limit  # of a model with learned positions: longer parts are read in several pieces
        documents = text.documents(1 << 30, limit, coder) if limit else text.documents(len(parts), len(text.ids), coder)
        unit = "documents" if len(corpus.documents) >= count else f"pieces of at most {characters:,} characters"
        result = document_perplexity(adapter, documents, chunk=s.chunk, batch=s.batch, seed=s.seed, unit=unit, on_progress=progress)
        if text.note:
            result |= {"note": text.note, "summary": f"{result['summary']}; {text.note}"}
        return {**result, "source": corpus.name, "characters": characters, **subject.about_text()}

    return [Item("documents", "documents", _settings(subject, True, documents=count, characters=characters), run)]


def position_items(subject: Subject) -> list[Item]:
    """Loss by position far beyond the training length, on prose and, in the long suites, on constant and random tokens."""

    def item(prompt: str, rows: int, length: int) -> Item:
        def run(progress: OnProgress) -> dict[str, Any]:
            s = subject.settings
            size = subject.text.bytes_per_token if prompt == "prose" else None
            ids_RL = subject.rows_of(prompt, rows, length + 1)
            result = position_curve(
                subject.adapter,
                ids_RL,
                chunk=s.chunk,
                batch=s.batch,
                seed=s.seed,
                through=subject.T,
                bytes_per_token=size,
                on_progress=progress,
            )
            same = subject.in_windows(prompt, ids_RL)
            source = subject.text.source if prompt == "prose" else f"{prompt} tokens"
            judged = collapse(result["buckets"], subject.T, same, subject.unlearnt())
            reach = subject.reach(prompt, ids_RL, rows, length + 1)
            return {**result, "prompt": prompt, "source": source, "same_in_windows": same, "collapse": judged, **reach}

        # With prose in any case: the verdict compares the model with a unigram of the text.
        return Item(f"position-{prompt}", "position", _settings(subject, True, rows=rows, length=length), run)

    items = [item("prose", subject.rows, subject.max_length)]
    if subject.settings.suite not in ("perplexity", "quick"):
        items += [item("constant", 1, subject.max_length), item("random", min(4, subject.rows), subject.max_length)]
    return items


def retrieval_items(subject: Subject) -> list[Item]:
    """A passkey in the quick suite, else every retrieval task, at each length."""
    tasks = [Task("passkey")]
    if not subject.quick:
        tasks += [
            Task("passkey", noise="prose"),
            Task("passkey", keys=4),
            Task("passkey", order="QDQ"),
            Task("passkey", order="DQDQ"),
            Task("niah_single"),
            Task("niah_multikey", noise="prose"),
            Task("vt"),
            Task("cwe"),
            Task("fwe"),
        ]
    count = subject.settings.depths
    depths = [(i + 0.5) / count for i in range(count)]

    def item(task: Task, length: int) -> Item:
        def run(progress: OnProgress) -> dict[str, Any]:
            s = subject.settings
            text = subject.text if task.noise == "prose" else None
            result = grid(
                subject.adapter,
                task,
                length,
                depths,
                subject.samples,
                seed=s.seed,
                chunk=s.chunk,
                batch=s.batch,
                text=text,
                on_progress=progress,
            )
            return {**result, **(subject.about_text() if text is not None else {})}

        asked = _settings(subject, task.noise == "prose", samples=subject.samples, depths=depths, task=task.label)
        return Item(f"{task.label}-{length}", "retrieval", asked, run)

    return [item(task, length) for task in tasks for length in subject.lengths]


def states_items(subject: Subject) -> list[Item]:
    """What happens to the recurrent states over a long text (models that have some), and what the model still remembers of it."""
    s, quick = subject.settings, subject.quick
    length, rows = min(subject.max_length, (4 if quick else 64) * subject.T), min(subject.rows, 2 if quick else 4)

    def states(prompt: str) -> Item:
        def run(progress: OnProgress) -> dict[str, Any]:
            ids_RL = subject.rows_of(prompt, rows, length)
            result = state_curve(subject.adapter, ids_RL, subject.T, chunk=s.chunk, on_progress=progress)
            return {"prompt": prompt, **result, **subject.reach(prompt, ids_RL, rows, length)}

        return Item(f"states-{prompt}", "states", _settings(subject, prompt == "prose", rows=rows, length=length), run)

    far = min(subject.max_length, (2 if quick else 4) * subject.T)

    def remembered(progress: OnProgress) -> dict[str, Any]:
        ids_RL = subject.rows_of("prose", subject.rows, far)
        end = ids_RL.shape[1]
        drops = sorted({0, end // 64, end // 16, end // 8, end // 4, end // 2, 3 * end // 4, 7 * end // 8} - {end - 1})
        result = effective_remembrance(subject.adapter, ids_RL, drops, chunk=s.chunk, on_progress=progress)
        return {**result, **subject.reach("prose", ids_RL, subject.rows, far)}

    prompts = [] if not subject.recurrent() else ["prose"] if quick else ["prose", "constant", "random"]
    return [
        *map(states, prompts),
        Item("remembrance", "remembrance", _settings(subject, True, rows=subject.rows, length=far), remembered),
    ]


def cure_items(subject: Subject) -> list[Item]:
    """The position curve under each cure, and without one on the same rows."""
    s = subject.settings
    if s.cures == "none":
        return []
    chosen = cures.suitable(subject.adapter) if s.cures == "default" else cures.parse(s.cures)
    length, rows = min(subject.max_length, 64 * subject.T), min(subject.rows, 8)
    chunk = min(s.chunk, max(64, subject.T // 4))

    def item(cure: cures.Cure | None) -> Item:
        label = cure.label if cure else "none"

        def run(progress: OnProgress) -> dict[str, Any]:
            ids_RL = subject.rows_of("prose", rows, length + 1)
            calibration_RL = subject.text.rows(*subject.text.fitting(4, subject.T), s.seed + 1)
            setting = cures.Setting(subject.T, length, calibration_RL, chunk)
            with cure.applied(subject.adapter, setting) if cure else contextlib.nullcontext():
                result = position_curve(
                    subject.adapter, ids_RL, chunk=chunk, batch=s.batch, seed=s.seed, through=subject.T, on_progress=progress
                )
                same = subject.in_windows("prose", ids_RL)
            judged = collapse(result["buckets"], subject.T, same, subject.unlearnt())
            reach = subject.reach("prose", ids_RL, rows, length + 1)
            return {**result, "cure": label, "same_in_windows": same, "collapse": judged, **reach}

        return Item(f"cure-{label}", "cure", _settings(subject, True, rows=rows, length=length, cure_chunk=chunk), run)

    return [item(None), *[item(cure) for cure in chosen]] if chosen else []


def harness_items(subject: Subject) -> list[Item]:
    """The tasks of lm-evaluation-harness that are asked for, by name or file."""
    s = subject.settings
    begin = {"auto": None, "true": True, "false": False}[s.add_bos_token]
    names: list[str] = []

    def item(task: str) -> Item:
        def run(progress: OnProgress) -> dict[str, Any]:
            return run_task(subject.adapter, task, chunk=s.chunk, batch=s.batch, limit=s.samples, seed=s.seed, add_bos_token=begin)

        names.append(name := f"harness-{Path(task).stem}")
        number = names.count(name)  # files of one name in different folders
        asked = {"task": task, "content": task_hash(task), "limit": s.samples, "seed": s.seed, "add_bos_token": s.add_bos_token}
        return Item(name if number == 1 else f"{name}-{number}", "harness", asked, run)

    return [item(task) for task in (s.tasks or TASKS).split(",") if task]
