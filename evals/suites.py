"""The suites: lists of items, run one by one, each kept as JSON at once, so that a stopped evaluation goes on where it was.

An item that fails (no tokenizer, prompt too long, out of memory, logits not finite) is one sentence in the report and the rest goes on.
Under a launcher (torchrun, deepspeed) the items are shared out over the processes, one GPU each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from evals.adapters import Adapter, ItemError, first_words, load_adapter
from evals.texts import Text, constant_rows, open_text, random_rows
from training.errors import UserError
from training.files import write_json
from training.launch import launch
from training.metrics import environment

FORMAT = 2  # raise it when the meaning of an item changes: older results are then made anew
SUITES = ("quick", "long_context", "state_tracking", "harness", "all")


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
    cures: str = "default"  # default | none | comma-separated, see evals/cures.py
    tasks: str = ""  # of the harness, with commas between them; empty: evals.harness.TASKS
    data: str | None = None
    text: str | None = None
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

    def __init__(self, adapter: Adapter, settings: Settings, run: dict[str, Any] | None = None) -> None:
        """run: what the checkpoint's run.json says."""
        self.adapter, self.settings = adapter, settings
        data = (run or {}).get("data") or {}
        self.task: dict[str, Any] | None = data.get("task") if data.get("reader") == "synthetic" else None
        run_data = data.get("path")
        self.T = settings.train_length or min(adapter.train_length or 512, 8192)
        self._run_data = run_data
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
            self._text = open_text(self.adapter, self.settings.data, self.settings.text, self._run_data)
        return self._text

    def rows_of(self, prompt: str, rows: int, length: int) -> Any:
        """(rows, length) ids of prose, random or constant tokens."""
        if prompt == "constant":
            return constant_rows(self.adapter, rows, length)
        if prompt == "random":
            return random_rows(self.adapter, rows, length, self.settings.seed)
        return self.text.rows(rows, length, self.settings.seed)

    def items(self) -> list[Item]:
        s, suite = self.settings, self.settings.suite
        found: list[Item] = []
        if suite == "state_tracking" or self.task and suite != "harness":
            found.append(self._tracking())  # a model of a generated task knows no text
        else:
            if suite in ("quick", "long_context", "all"):
                found += self._documents() + self._position() + self._states() + self._retrieval()
            if suite in ("long_context", "all") or (suite == "quick" and s.cures not in ("default", "none")):
                found += self._cures()
            if suite in ("harness", "all"):
                found += self._harness()
        parts = s.only.split(",")
        return [item for item in found if any(part in item.name for part in parts)]

    def _common(self, **more: Any) -> dict[str, Any]:
        s = self.settings
        return {"T": self.T, "seed": s.seed, "chunk": s.chunk, "data": s.data, "text": s.text, **more}

    def _tracking(self) -> Item:
        from data.synthetic import build_task
        from evals.state_tracking import default_lengths, evaluate

        s, quick = self.settings, self.settings.suite == "quick"
        sequences = s.sequences or (200 if quick else 1000)

        def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
            if not self.task:
                raise ItemError(f"{self.adapter.folder} was not trained on a generated task; train one: python train.py experiment=synthetic/parity")
            task = build_task(self.task)
            lengths, model = s.lengths or default_lengths(self.T, task), self.adapter.model
            result = evaluate(
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
            shown = ", ".join(f"{r['length']:,}: {100 * r['accuracy']:.1f} %" if "accuracy" in r else f"{r['length']:,}: -" for r in result["lengths"])
            return {**result, "sequences": sequences, "summary": f"{result['task']['name']} by length: {shown}"}

        return Item("state_tracking", "tracking", {"lengths": s.lengths, "sequences": sequences, "seed": s.seed, "task": self.task}, run)

    def _documents(self) -> list[Item]:
        from evals.documents import document_perplexity

        s, quick = self.settings, self.settings.suite == "quick"
        count, length = s.rows or (16 if quick else 64), min(self.max_length, 4 * self.T)

        def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
            documents = self.text.documents(count, length, self.adapter.need_coder().decode)
            found = document_perplexity(self.adapter, documents, chunk=s.chunk, batch=s.batch, seed=s.seed, on_progress=progress)
            return {**found, "source": self.text.source, "cut_to": length}

        return [Item("documents", "documents", self._common(documents=count, length=length), run)]

    def _position(self) -> list[Item]:
        from evals.position import collapse, position_curve

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
                judged = collapse(result["buckets"], self.T, same)
                return {**result, "prompt": prompt, "source": source, "same_in_windows": same, "collapse": judged}

            return Item(f"position-{prompt}", "position", self._common(rows=rows, length=length), run)

        items = [item("prose", self.rows, self.max_length)]
        if self.settings.suite != "quick":
            items += [item("constant", 1, self.max_length), item("random", min(4, self.rows), self.max_length)]
        return items

    def _windows(self, prompt: str, ids: Any) -> dict[str, Any] | None:
        """The same rows in windows of T tokens, which the long ones are judged against. Of constant tokens there is only one row."""
        from evals.position import windows

        if prompt == "constant" or ids.shape[1] - 1 <= self.T:
            return None
        batch = max(self.settings.batch, min(256, 8192 // self.T))
        return windows(self.adapter, ids, self.T, chunk=self.settings.chunk, batch=batch, seed=self.settings.seed)

    def _retrieval(self) -> list[Item]:
        from evals.retrieval import grid
        from evals.tasks import Task

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
                return grid(
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

            return Item(f"{task.label}-{length}", "retrieval", self._common(samples=self.samples, depths=depths, task=task.label), run)

        return [item(task, length) for task in tasks for length in self.lengths]

    def _states(self) -> list[Item]:
        from evals.state_collapse import effective_remembrance, state_curve

        quick = self.settings.suite == "quick"
        length = min(self.max_length, (4 if quick else 64) * self.T)
        rows = min(self.rows, 2 if quick else 4)

        def states(prompt: str) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                ids = self.rows_of(prompt, rows, length)
                return {"prompt": prompt, **state_curve(self.adapter, ids, self.T, chunk=self.settings.chunk, on_progress=progress)}

            return Item(f"states-{prompt}", "states", self._common(rows=rows, length=length), run)

        far = min(self.max_length, (2 if quick else 4) * self.T)
        drops = sorted({0, far // 64, far // 16, far // 8, far // 4, far // 2, 3 * far // 4, 7 * far // 8} - {far - 1})

        def remembered(progress: Callable[[int, int], None]) -> dict[str, Any]:
            ids = self.rows_of("prose", self.rows, far)
            return effective_remembrance(self.adapter, ids, drops, chunk=self.settings.chunk, on_progress=progress)

        items = [states("prose")] if self._recurrent() else []
        if not quick and items:
            items += [states("constant"), states("random")]
        return [*items, Item("remembrance", "remembrance", self._common(rows=self.rows, length=far), remembered)]

    def _recurrent(self) -> bool:
        """Whether there is a state to look at; a model that cannot be asked is left to fail in its items."""
        try:
            state = self.adapter.advance(torch.zeros(1, 2, dtype=torch.long), self.adapter.start(1))
            return bool(self.adapter.layer_states(state))
        except Exception:
            return True

    def _cures(self) -> list[Item]:
        """The position curve under each cure, and without one on the same rows."""
        from evals import cures
        from evals.position import collapse, position_curve

        if self.settings.cures == "none":
            return []
        chosen = cures.suitable(self.adapter) if self.settings.cures == "default" else cures.parse(self.settings.cures)
        length, rows = min(self.max_length, 64 * self.T), min(self.rows, 8)
        chunk = min(self.settings.chunk, max(64, self.T // 4))

        def item(cure: Any) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                s = self.settings
                ids = self.rows_of("prose", rows, length + 1)
                calibration = self.text.rows(4, self.T, s.seed + 1)
                setting = cures.Setting(self.T, length, calibration, chunk)
                with cure.applied(self.adapter, setting) if cure else contextlib.nullcontext():
                    result = position_curve(
                        self.adapter, ids, chunk=chunk, batch=s.batch, seed=s.seed, through=self.T, on_progress=progress
                    )
                    same = self._windows("prose", ids)
                judged = collapse(result["buckets"], self.T, same)
                return {**result, "cure": cure.label if cure else "none", "same_in_windows": same, "collapse": judged}

            return Item(f"cure-{cure.label if cure else 'none'}", "cure", self._common(rows=rows, length=length, cure_chunk=chunk), run)

        return [item(None), *[item(cure) for cure in chosen]] if chosen else []

    def _harness(self) -> list[Item]:
        from evals.harness import TASKS, run_task

        s = self.settings

        def item(task: str) -> Item:
            def run(progress: Callable[[int, int], None]) -> dict[str, Any]:
                return run_task(self.adapter, task, chunk=s.chunk, batch=s.batch, limit=s.samples, seed=s.seed)

            return Item(f"harness-{Path(task).stem}", "harness", {"task": task, "limit": s.samples, "seed": s.seed}, run)

        return [item(task) for task in (s.tasks or TASKS).split(",") if task]


def fingerprint(adapter: Adapter) -> str:
    """Of the weights as they are in memory: sums of every parameter, so a changed checkpoint is evaluated anew."""
    digest = hashlib.sha256()
    for name, p in adapter.model.named_parameters():
        x = p.detach().double()
        digest.update(f"{name} {tuple(p.shape)} {float(x.sum()):.9e} {float(x.square().sum()):.9e}".encode())
    return digest.hexdigest()[:16]


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
    mark, env, records = fingerprint(adapter), environment(adapter.device), []
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
            return item.run(_progress(item.name))

        record |= guarded(work)
        record |= {"seconds": time.perf_counter() - start, "model": adapter.describe(), "weights": mark, "environment": env}
        write_json(path, record)
        records.append(record)
        print(f"[{number}/{len(mine)}] {adapter.name}: {item.name}: {headline(record)} ({record['seconds']:.1f} s)", flush=True)
    return records


def _progress(name: str) -> Callable[[int, int], None]:
    shown = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 1:
            shown = time.monotonic()
            print(f"\r  {name} {100 * done / max(1, total):.0f} %   ", end="", file=sys.stderr, flush=True)

    return tell


def headline(record: dict[str, Any]) -> str:
    """One line about a record."""
    if record["status"] != "done":
        return "NOT MEASURED: " + record["reason"]
    result, kind = record["result"], record["kind"]
    if kind == "retrieval":
        return f"{100 * result['accuracy']:.0f} % ({100 * result['low']:.0f}-{100 * result['high']:.0f}, n={result['n']})"
    if kind in ("position", "cure"):
        verdict = result.get("collapse", {}).get("verdict", "")
        return f"{result['nats_per_token']:.3f} nats per token over {result['tokens']:,} tokens; {verdict}"
    return str(result.get("summary", "done"))


def evaluate(paths: list[str], settings: Settings, out: Path, device: str, precision: str, gguf: str | None = None) -> int:
    """Runs a suite on every checkpoint and writes OUT/NAME/SUITE.json, OUT/report.md and OUT/report.html; the number of failed items."""
    from evals.report import write_report

    started = launch()
    rank, world, local = started.rank, started.size, started.local
    where = torch.device(_device(device, local))
    names: dict[str, str] = {}
    failed = 0
    for path in paths:
        name = _name(path, names)
        names[name] = path
        loading = out / name / "items" / "loading.json"
        try:
            adapter = load_adapter(path, where, precision, gguf)
        except (UserError, torch.OutOfMemoryError) as error:
            if len(paths) == 1:
                raise
            failed += 1
            reason = str(error) if isinstance(error, UserError) else f"The model does not fit into the device's memory ({first_words(error)[:120]})."
            print(f"{name}: NOT MEASURED: {reason}", flush=True)
            write_json(loading, _not_loaded(name, path, reason, precision, where))
            continue
        loading.unlink(missing_ok=True)
        adapter.name = name
        bench = Bench(adapter, settings, _run(path))
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
    return failed


def _not_loaded(name: str, path: str, reason: str, precision: str, device: torch.device) -> dict[str, Any]:
    """The record of a model that could not be loaded, for the report; the other models go on."""
    model = {"name": name, "folder": path, "kind": "not loaded", "parameters": None, "train_length": None, "carry": None, "precision": precision}
    return {"item": "loading", "kind": "loading", "key": "", "status": "failed", "reason": reason, "model": model, "environment": environment(device)}


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


def _run(path: str) -> dict[str, Any]:
    """run.json of a checkpoint of ours: its data and training length; {} where there is none."""
    try:
        from training.checkpoint import find

        return dict(json.loads((find(Path(path)) / "run.json").read_text()))
    except (OSError, ValueError, TypeError, UserError):
        return {}
