"""The suites: lists of items, run one by one, each kept as JSON at once, so that a stopped evaluation goes on where it was.

An item that fails (no tokenizer, prompt too long, out of memory, logits not finite) is one sentence in the report and the rest goes on.
Under a launcher (torchrun, deepspeed) the items are shared out over the processes, one GPU each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from data.files import check_writable, write_json
from evals.adapters.base import Adapter, ItemError, first_words
from evals.adapters.load import load_adapter
from evals.adapters.own import OwnAdapter
from evals.inputs.common_text import CommonText
from evals.inputs.texts import Corpus, Text, constant_rows, random_rows, tokenised
from evals.measures.position import unlearnt
from evals.progress import Progress
from training.errors import UserError
from training.launch import launch
from training.watch.metrics import environment

FORMAT = 3  # raise it when the meaning of an item changes: older results are then made anew
SUITES = ("perplexity", "quick", "long_context", "state_tracking", "harness", "all")


@dataclass
class Settings:
    """What a user can set; None: derived from the model's training length T."""

    suite: str = "quick"
    train_length: int | None = None  # T; tokens of a training sequence
    max_length: int | None = None  # longest position curve
    lengths: list[int] = field(default_factory=list)  # of retrieval prompts
    depths: int = 5
    samples: int | None = None  # prompts at each length and depth
    sequences: int | None = None  # of a generated task, at each length
    rows: int | None = None  # sequences of a position curve, and documents
    chunk: int = 2048
    batch: int = 8
    seed: int = 0
    cures: str = "default"  # default | none | comma-separated, see evals/cures/options.py
    tasks: str = ""  # of the harness, with commas between them; empty: evals.measures.harness.TASKS
    data: str | None = None
    text: str | None = None
    add_bos_token: str = "auto"  # of the harness: true, false, or auto: as the tokenizer says
    only: str = ""  # runs only items whose name contains this (or one of several, with commas between them)
    redo: bool = False


@dataclass
class Item:
    """name: unique in a suite; settings: all that the result depends on beside the model; run(progress) -> result."""

    name: str
    kind: str  # documents | position | retrieval | states | remembrance | cure | tracking | harness: what the report draws
    settings: dict[str, Any]
    run: Callable[[Callable[[int, int], None]], dict[str, Any]]


class Bench:
    """A model with its text, and the items that its suite consists of."""

    def __init__(
        self,
        adapter: Adapter,
        settings: Settings,
        run: dict[str, Any] | None = None,
        common: CommonText | None = None,
        path: str | None = None,
    ) -> None:
        """run: what the checkpoint's run.json says; common: the text of all models; path: what the model is called there."""
        self.adapter, self.settings = adapter, settings
        self.path = path or adapter.folder
        self.common = common or CommonText([self.path], settings.data, settings.text, {self.path: {"run": run or {}}})
        data = (run or {}).get("data") or {}
        self.task: dict[str, Any] | None = data.get("task") if data.get("reader") == "synthetic" else None
        self.T = settings.train_length or min(adapter.train_length or 512, 8192)
        self._unlearnt: str | None = None
        self._text: Text | None = None
        limit = adapter.position_limit or 1 << 62
        quick = settings.suite == "quick"
        self.max_length = settings.max_length or min((4 if quick else 64) * self.T, limit)
        self.lengths = settings.lengths or [n for n in self._powers(4 * self.T if quick else 16 * self.T) if n <= limit]
        self.samples = settings.samples or (5 if quick else 20)
        self.rows = settings.rows or (4 if quick else 16)

    def _powers(self, most: int) -> list[int]:
        low = max(256, self.T // 4)
        return [low * 2**k for k in range(40) if low * 2**k <= max(low, most)]

    @property
    def text(self) -> Text:
        if self._text is None:
            self._text = tokenised(self.common.corpus, self.adapter)
        return self._text

    def about_text(self) -> dict[str, Any]:
        """What a result on prose says of its text: which it is, and whether the model was trained on it."""
        return {"text": self.common.corpus.to_dict(), "seen": self.common.seen_by(self.path)}

    def unlearnt(self) -> str:
        """Why the model gets no verdict: it is no better than a unigram of the text, or it cannot be told; '' for one that has learnt."""
        if self._unlearnt is None:
            try:
                rows, length = self.text.fitting(4, min(self.T, 1024) + 1)
                ids = self.text.rows(rows, length, self.settings.seed)
            except ItemError:
                self._unlearnt = "there is no text to tell whether the model has learnt anything"
                return self._unlearnt
            total: list[float] = []

            def each(first: int, nll: torch.Tensor, state: Any) -> None:
                total.append(float(nll.double().sum()))

            self.adapter.stream(torch.from_numpy(ids), self.settings.chunk, each)
            self._unlearnt = unlearnt(sum(total) / (rows * (length - 1)), ids[:, 1:], self.text.ids, self.adapter.vocab_size)
        return self._unlearnt

    def rows_of(self, prompt: str, rows: int, length: int) -> Any:
        """Up to (rows, length) ids of prose, as far as the text reaches; (rows, length) random or constant tokens."""
        if prompt == "constant":
            return constant_rows(self.adapter, rows, length)
        if prompt == "random":
            return random_rows(self.adapter, rows, length, self.settings.seed)
        return self.text.rows(*self.text.fitting(rows, length), self.settings.seed)

    def _reach(self, prompt: str, ids: Any, rows: int, length: int) -> dict[str, Any]:
        """What a result on these rows says of them: the text, and how far it reaches where it does not give all that was asked for."""
        if prompt != "prose":
            return {}
        found: dict[str, Any] = {"asked_length": length, "asked_rows": rows, **self.about_text()}
        if ids.shape[1] < length:
            found["note"] = f"the text reaches {ids.shape[1]:,} tokens of the {length:,} asked for"
        elif ids.shape[0] < rows:
            found["note"] = f"the text gives {ids.shape[0]} row(s) of the {rows} asked for"
        return found

    def items(self) -> list[Item]:
        s, suite = self.settings, self.settings.suite
        found: list[Item] = []
        if suite == "state_tracking" or self.task and suite != "harness":
            found.append(self._tracking())  # a model of a generated task knows no text
        else:
            if suite in ("perplexity", "quick", "long_context", "all"):
                found += self._documents() + self._position()
            if suite in ("quick", "long_context", "all"):
                found += self._states() + self._retrieval()
            if suite in ("long_context", "all") or (suite == "quick" and s.cures not in ("default", "none")):
                found += self._cures()
            if suite in ("harness", "all"):
                found += self._harness()
        parts = s.only.split(",")
        return [item for item in found if any(part in item.name for part in parts)]

    def _common(self, prose: bool, **more: Any) -> dict[str, Any]:
        """Settings of an item; of one that reads prose, the hash of the text as well."""
        s = self.settings
        text = {"text": self._text_hash()} if prose else {}
        return {"T": self.T, "seed": s.seed, "chunk": s.chunk, **text, **more}

    def _text_hash(self) -> str:
        if self.adapter.coder is None and self.common.text is not None:
            return "none"  # its items are going to say that there is no tokenizer
        return self.common.corpus.sha256

    def _tracking(self) -> Item:
        from data.synthetic import build_task
        from evals.measures.tracking import accuracy_by_length, default_lengths

        s, quick = self.settings, self.settings.suite == "quick"
        sequences = s.sequences or (200 if quick else 1000)

        def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
            if not self.task:
                raise ItemError(
                    f"{self.adapter.folder} was not trained on a generated task; train one: python train.py experiment=synthetic/parity"
                )
            task = build_task(self.task)
            lengths, model = s.lengths or default_lengths(self.T, task), self.adapter.model
            result = accuracy_by_length(
                cast(Any, model),
                task,
                lengths,
                train_length=self.T,
                sequences=sequences,
                seed=s.seed,
                batch=max(64, s.batch),
                chunk=min(s.chunk, 512),
                precision=self.adapter.precision,
                on_progress=lambda row: progress(lengths.index(row["length"]) + 1, len(lengths)),
            )
            shown = ", ".join(
                f"{r['length']:,}: {100 * r['accuracy']:.1f} %" if "accuracy" in r else f"{r['length']:,}: -" for r in result["lengths"]
            )
            return {**result, "sequences": sequences, "summary": f"{result['task']['name']} by length: {shown}"}

        return Item("state_tracking", "tracking", {"lengths": s.lengths, "sequences": sequences, "seed": s.seed, "task": self.task}, run)

    def _documents(self) -> list[Item]:
        from evals.measures.documents import document_perplexity

        s, quick = self.settings, self.settings.suite == "quick"
        count, characters = s.rows or (16 if quick else 64), self.common.characters(s.train_length, s.max_length)

        def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
            corpus, decode = self.common.corpus, self.adapter.need_coder().decode
            parts = corpus.excerpts(count, characters)
            text = tokenised(Corpus(corpus.name, parts), self.adapter)
            limit = self.adapter.position_limit  # of a model with learned positions: longer parts are read in several pieces
            documents = text.documents(1 << 30, limit, decode) if limit else text.documents(len(parts), len(text.ids), decode)
            unit = "documents" if len(corpus.documents) >= count else f"pieces of {characters:,} characters"
            found = document_perplexity(self.adapter, documents, chunk=s.chunk, batch=s.batch, seed=s.seed, unit=unit, on_progress=progress)
            return {**found, "source": corpus.name, "characters": characters, **self.about_text()}

        return [Item("documents", "documents", self._common(True, documents=count, characters=characters), run)]

    def _position(self) -> list[Item]:
        from evals.measures.position import collapse, position_curve

        def item(prompt: str, rows: int, length: int) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                s = self.settings
                size = self.text.bytes_per_token if prompt == "prose" else None
                ids = self.rows_of(prompt, rows, length + 1)
                result = position_curve(
                    self.adapter,
                    ids,
                    chunk=s.chunk,
                    batch=s.batch,
                    seed=s.seed,
                    through=self.T,
                    bytes_per_token=size,
                    on_progress=progress,
                )
                same = self._windows(prompt, ids)
                source = self.text.source if prompt == "prose" else f"{prompt} tokens"
                judged = collapse(result["buckets"], self.T, same, self.unlearnt())
                reach = self._reach(prompt, ids, rows, length + 1)
                return {**result, "prompt": prompt, "source": source, "same_in_windows": same, "collapse": judged, **reach}

            return Item(f"position-{prompt}", "position", self._common(True, rows=rows, length=length), run)

        items = [item("prose", self.rows, self.max_length)]
        if self.settings.suite not in ("perplexity", "quick"):
            items += [item("constant", 1, self.max_length), item("random", min(4, self.rows), self.max_length)]
        return items

    def _windows(self, prompt: str, ids: Any) -> dict[str, Any] | None:
        """The same rows in windows of T tokens, which the long ones are judged against. Of constant tokens there is only one row."""
        from evals.measures.position import windows

        if prompt == "constant" or ids.shape[1] - 1 <= self.T:
            return None
        batch = max(self.settings.batch, min(256, 8192 // self.T))
        return windows(self.adapter, ids, self.T, chunk=self.settings.chunk, batch=batch, seed=self.settings.seed)

    def _retrieval(self) -> list[Item]:
        from evals.inputs.tasks import Task
        from evals.measures.retrieval import grid

        tasks = [Task("passkey")]
        if self.settings.suite != "quick":
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
        depths = [(i + 0.5) / self.settings.depths for i in range(self.settings.depths)]

        def item(task: Any, length: int) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                s = self.settings
                text = self.text if task.noise == "prose" else None
                found = grid(
                    self.adapter,
                    task,
                    length,
                    depths,
                    self.samples,
                    seed=s.seed,
                    chunk=s.chunk,
                    batch=s.batch,
                    text=text,
                    on_progress=progress,
                )
                return {**found, **(self.about_text() if text is not None else {})}

            asked = self._common(task.noise == "prose", samples=self.samples, depths=depths, task=task.label)
            return Item(f"{task.label}-{length}", "retrieval", asked, run)

        return [item(task, length) for task in tasks for length in self.lengths]

    def _states(self) -> list[Item]:
        from evals.measures.states import effective_remembrance, state_curve

        quick = self.settings.suite == "quick"
        length = min(self.max_length, (4 if quick else 64) * self.T)
        rows = min(self.rows, 2 if quick else 4)

        def states(prompt: str) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                ids = self.rows_of(prompt, rows, length)
                found = state_curve(self.adapter, ids, self.T, chunk=self.settings.chunk, on_progress=progress)
                return {"prompt": prompt, **found, **self._reach(prompt, ids, rows, length)}

            return Item(f"states-{prompt}", "states", self._common(prompt == "prose", rows=rows, length=length), run)

        far = min(self.max_length, (2 if quick else 4) * self.T)

        def remembered(progress: Callable[[int, int], None]) -> dict[str, Any]:
            ids = self.rows_of("prose", self.rows, far)
            end = ids.shape[1]
            drops = sorted({0, end // 64, end // 16, end // 8, end // 4, end // 2, 3 * end // 4, 7 * end // 8} - {end - 1})
            found = effective_remembrance(self.adapter, ids, drops, chunk=self.settings.chunk, on_progress=progress)
            return {**found, **self._reach("prose", ids, self.rows, far)}

        items = [states("prose")] if self._recurrent() else []
        if not quick and items:
            items += [states("constant"), states("random")]
        return [*items, Item("remembrance", "remembrance", self._common(True, rows=self.rows, length=far), remembered)]

    def _recurrent(self) -> bool:
        """Whether there is a state to look at; a model that cannot be asked is left to fail in its items."""
        try:
            state = self.adapter.advance(torch.zeros(1, 2, dtype=torch.long), self.adapter.start(1))
            return bool(self.adapter.layer_states(state))
        except Exception:
            return True

    def _cures(self) -> list[Item]:
        """The position curve under each cure, and without one on the same rows."""
        from evals.cures import options as cures
        from evals.measures.position import collapse, position_curve

        if self.settings.cures == "none":
            return []
        chosen = cures.suitable(self.adapter) if self.settings.cures == "default" else cures.parse(self.settings.cures)
        length, rows = min(self.max_length, 64 * self.T), min(self.rows, 8)
        chunk = min(self.settings.chunk, max(64, self.T // 4))

        def item(cure: Any) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                s = self.settings
                ids = self.rows_of("prose", rows, length + 1)
                calibration = self.text.rows(*self.text.fitting(4, self.T), s.seed + 1)
                setting = cures.Setting(self.T, length, calibration, chunk)
                with cure.applied(self.adapter, setting) if cure else contextlib.nullcontext():
                    result = position_curve(
                        self.adapter, ids, chunk=chunk, batch=s.batch, seed=s.seed, through=self.T, on_progress=progress
                    )
                    same = self._windows("prose", ids)
                judged = collapse(result["buckets"], self.T, same, self.unlearnt())
                reach = self._reach("prose", ids, rows, length + 1)
                return {**result, "cure": cure.label if cure else "none", "same_in_windows": same, "collapse": judged, **reach}

            return Item(
                f"cure-{cure.label if cure else 'none'}", "cure", self._common(True, rows=rows, length=length, cure_chunk=chunk), run
            )

        return [item(None), *[item(cure) for cure in chosen]] if chosen else []

    def _harness(self) -> list[Item]:
        from evals.measures.harness import TASKS, run_task, task_hash

        s = self.settings
        begin = {"auto": None, "true": True, "false": False}[s.add_bos_token]
        names: list[str] = []

        def item(task: str) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                return run_task(self.adapter, task, chunk=s.chunk, batch=s.batch, limit=s.samples, seed=s.seed, add_bos_token=begin)

            names.append(name := f"harness-{Path(task).stem}")
            number = names.count(name)  # files of one name in different folders
            asked = {"task": task, "content": task_hash(task), "limit": s.samples, "seed": s.seed, "add_bos_token": s.add_bos_token}
            return Item(name if number == 1 else f"{name}-{number}", "harness", asked, run)

        return [item(task) for task in (s.tasks or TASKS).split(",") if task]


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """{'status': 'done', 'result': ...} or {'status': 'failed', 'reason': one sentence}. Only what a user stops passes through."""
    try:
        result = run()
        if bad := _not_finite(result):
            return {"status": "failed", "reason": f"The result holds a value that is not finite ({bad})."}
        return {"status": "done", "result": result}
    except (ItemError, UserError) as error:
        return {"status": "failed", "reason": str(error)}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"status": "failed", "reason": f"Out of memory on the device; try a smaller batch or chunk ({first_words(error)[:120]})."}
    except Exception as error:  # a foreign model may raise anything; the other items are still worth having
        return {"status": "failed", "reason": f"{type(error).__name__}: {first_words(error)}"}


def _not_finite(value: Any, path: str = "") -> str:
    """Path of the first nats figure that is not finite; intervals may be NaN (too few units)."""
    if isinstance(value, dict):
        return next((p for k, v in value.items() if (p := _not_finite(v, f"{path}.{k}" if path else str(k)))), "")
    if isinstance(value, list):
        return next((p for i, v in enumerate(value) if (p := _not_finite(v, f"{path}[{i}]"))), "")
    return path if isinstance(value, float) and not math.isfinite(value) and path.endswith("nats_per_token") else ""


def read_item(path: Path, key: str) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return held if held.get("key") == key else None


def run_items(items: list[Item], adapter: Adapter, folder: Path, redo: bool, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Runs what is not there yet (failed items are tried again) and returns the records of this process's items."""
    mark, env, records = adapter.content_hash(), environment(adapter.device), []
    mine = items[rank::world]
    for number, item in enumerate(mine, 1):
        key = hashlib.sha256(json.dumps([FORMAT, mark, item.name, adapter.precision, item.settings], sort_keys=True).encode()).hexdigest()
        path = folder / "items" / f"{item.name}.json"
        held = None if redo else read_item(path, key)
        if held is not None and held["status"] == "done":
            print(f"[{number}/{len(mine)}] {adapter.name}: {item.name}: there already", flush=True)
            records.append(held)
            continue
        start = time.perf_counter()
        record: dict[str, Any] = {"item": item.name, "kind": item.kind, "key": key, "settings": item.settings}

        def work(item: Item = item) -> dict[str, Any]:
            with Progress(f"{adapter.name}: {item.name}") as progress:
                return item.run(progress)

        record |= guarded(work)
        record |= {"seconds": time.perf_counter() - start, "model": adapter.describe(), "weights": mark, "environment": env}
        write_json(path, record)
        records.append(record)
        print(f"[{number}/{len(mine)}] {adapter.name}: {item.name}: {headline(record)} ({record['seconds']:.1f} s)", flush=True)
    return records


def headline(record: dict[str, Any]) -> str:
    """One line about a record."""
    if record["status"] != "done":
        return "NOT MEASURED: " + record["reason"]
    result, kind = record["result"], record["kind"]
    if kind == "retrieval":
        beside = ", ".join(f"{name} {100 * value:.3g} %" for name, value in result.get("without_reading", {}).items())
        return f"{100 * result['accuracy']:.0f} % ({100 * result['low']:.0f}-{100 * result['high']:.0f}, n={result['n']}; without reading: {beside})"
    if kind in ("position", "cure"):
        verdict = result.get("collapse", {}).get("verdict", "")
        reach = f"{result['note']}; " if "note" in result else ""
        return f"{result['nats_per_token']:.3f} nats per token over {result['tokens']:,} tokens; {reach}{verdict}"
    return str(result.get("summary", "done"))


def evaluate(
    paths: list[str], settings: Settings, out: Path, device: str, precision: str, gguf: str | None = None, trust_remote_code: bool = False
) -> int:
    """Runs a suite on every checkpoint, all on one text, and writes OUT/NAME/SUITE.json, OUT/report.md and OUT/report.html; the number of failed
    items. Raises UserError before anything is measured where OUT cannot be written, and where no model could be loaded."""
    from evals.report.page import write_report

    check_writable(out)
    common = CommonText(paths, settings.data, settings.text)
    started = launch()
    rank, world, local = started.rank, started.size, started.local
    where = torch.device(_device(device, local))
    names: dict[str, str] = {}
    failed = loaded = 0
    for path in paths:
        name = _name(path, names)
        names[name] = path
        loading = out / name / "items" / "loading.json"
        try:
            adapter = load_adapter(path, where, precision, gguf, trust_remote_code)
        except (UserError, torch.OutOfMemoryError) as error:
            if len(paths) == 1:
                raise
            failed += 1
            reason = (
                str(error)
                if isinstance(error, UserError)
                else f"The model does not fit into the device's memory ({first_words(error)[:120]})."
            )
            print(f"{name}: NOT MEASURED: {reason}", flush=True)
            write_json(loading, _not_loaded(name, path, reason, precision, where))
            continue
        loading.unlink(missing_ok=True)
        loaded += 1
        adapter.name = name
        run = common.facts[path].get("run") if isinstance(adapter, OwnAdapter) else None  # only ours can be asked a generated task
        bench = Bench(adapter, settings, run, common, path)
        items = bench.items()
        if not items:
            if len(paths) > 1:
                continue
            raise UserError(f"No item of suite {settings.suite} contains {settings.only!r} in its name.")
        records = run_items(items, adapter, out / name, settings.redo, rank, world)
        failed += sum(r["status"] != "done" for r in records)
        everything = [r for item in items if (r := _read(out / name / "items" / f"{item.name}.json"))]
        write_json(out / name / f"{settings.suite}.json", {"model": adapter.describe(), "settings": vars(settings), "items": everything})
        del adapter, bench
    write_report(out)
    print(f"written: {out / 'report.html'}, {out / 'report.md'}")
    if not loaded:
        raise UserError("None of the models could be loaded, so nothing was measured.")
    return failed


def _not_loaded(name: str, path: str, reason: str, precision: str, device: torch.device) -> dict[str, Any]:
    """The record of a model that could not be loaded, for the report; the other models go on."""
    model = {
        "name": name,
        "folder": path,
        "kind": "not loaded",
        "parameters": None,
        "train_length": None,
        "carry": None,
        "precision": precision,
    }
    return {
        "item": "loading",
        "kind": "loading",
        "key": "",
        "status": "failed",
        "reason": reason,
        "model": model,
        "environment": environment(device),
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _device(name: str, local: int) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}; choose auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no GPU; give device=cpu.")
    return f"cuda:{local}" if name != "cpu" and torch.cuda.is_available() else "cpu"


def _name(path: str, taken: dict[str, str]) -> str:
    """The last telling part of a path: run folders are called something, their checkpoints step-..."""
    parts = [p for p in Path(path).resolve().parts if p not in ("checkpoints", "/")]
    name = parts[-1] if not parts[-1].startswith("step-") or len(parts) < 2 else f"{parts[-2]}-{parts[-1]}"
    number, wanted = 2, name
    while name in taken:
        name, number = f"{wanted}-{number}", number + 1
    return name
