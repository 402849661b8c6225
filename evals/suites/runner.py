"""Runs the items of a suite one by one and writes each as JSON at once, so that a stopped evaluation goes on where it was.

An item that fails (no tokenizer, prompt too long, out of memory, logits not finite) is one sentence in the report and the rest goes on.
Under a launcher (torchrun, deepspeed) the items are shared out over the processes, one GPU each.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.files import check_writable, lock, write_json
from evals.adapters.base import Adapter, ItemError, first_words
from evals.adapters.load import device_of, load_adapter
from evals.adapters.own import OwnAdapter
from evals.inputs.common_text import CommonText
from evals.progress import Progress
from evals.report.sections import write_report
from evals.suites.items import Item, items_of
from evals.suites.subject import Settings, Subject
from training.errors import UserError
from training.launch import launch
from training.watch.metrics import environment

FORMAT = 3  # raise it when the meaning of an item changes: older results are then made anew


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
    """Path of the first nats figure that is not finite, '' where all are; intervals may be NaN (too few units)."""
    if isinstance(value, dict):
        return next((p for k, v in value.items() if (p := _not_finite(v, f"{path}.{k}" if path else str(k)))), "")
    if isinstance(value, list):
        return next((p for i, v in enumerate(value) if (p := _not_finite(v, f"{path}[{i}]"))), "")
    return path if isinstance(value, float) and not math.isfinite(value) and path.endswith("nats_per_token") else ""


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of an item, None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_items(items: list[Item], adapter: Adapter, folder: Path, redo: bool, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Runs what is not in folder/items yet (failed items are tried again, with `redo` all of them); the records of this process's items.

    A record is there already if model, precision, format and the item's settings are the same. rank of world processes take turns in the list.
    """
    weights, env, records = adapter.content_hash(), environment(adapter.device), []
    mine = items[rank::world]
    for number, item in enumerate(mine, 1):
        identity = [FORMAT, weights, item.name, adapter.precision, item.settings]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = folder / "items" / f"{item.name}.json"
        earlier = None if redo else read_record(path)
        if earlier is not None and earlier.get("key") == key and earlier["status"] == "done":
            print(f"[{number}/{len(mine)}] {adapter.name}: {item.name}: there already", flush=True)
            records.append(earlier)
            continue
        start = time.perf_counter()
        record: dict[str, Any] = {"item": item.name, "kind": item.kind, "key": key, "settings": item.settings}

        def work(item: Item = item) -> dict[str, Any]:
            with Progress(f"{adapter.name}: {item.name}") as progress:
                return item.run(progress)

        record |= guarded(work)
        record |= {"seconds": time.perf_counter() - start, "model": adapter.describe(), "weights": weights, "environment": env}
        write_json(path, record)
        records.append(record)
        print(f"[{number}/{len(mine)}] {adapter.name}: {item.name}: {headline(record)} ({record['seconds']:.1f} s)", flush=True)
    return records


def headline(record: dict[str, Any]) -> str:
    """A record in one line, for the log."""
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
    """Runs a suite on every checkpoint, all on one text, and writes OUT/NAME/SUITE.json, OUT/report.md and OUT/report.html.

    device: auto, cpu or cuda; the other arguments are those of `load_adapter`. Returns 1 where no item of any model could be measured by a process alone, else 0: what
    failed beside others is in the report. Raises UserError before anything is measured where OUT cannot be written, and where no model could be loaded.
    """
    check_writable(out)
    common = CommonText(paths, settings.data, settings.text)
    started, where = launch(), device_of(device)
    names: dict[str, str] = {}
    measured = loaded = having = 0
    for path in paths:
        name = _name(path, names, out)
        names[name] = path
        loading = out / name / "items" / "loading.json"
        try:
            adapter = load_adapter(path, where, precision, gguf, trust_remote_code)
        except (UserError, torch.OutOfMemoryError) as error:
            if len(paths) == 1:
                raise
            write_json(loading, _not_loaded(name, path, error, precision, where))
            continue
        loading.unlink(missing_ok=True)
        loaded += 1
        adapter.name = name
        run = common.facts[path].get("run") if isinstance(adapter, OwnAdapter) else None  # only ours can be asked a generated task
        items = items_of(Subject(adapter, settings, run, common, path))
        if not items:  # another model may have some
            continue
        having += 1
        records = run_items(items, adapter, out / name, settings.redo, started.rank, started.size)
        measured += sum(r["status"] == "done" for r in records) or started.size > 1  # a process of several has not seen all items
        with _alone(out):
            everything = [r for item in items if (r := read_record(out / name / "items" / f"{item.name}.json"))]
            write_json(
                out / name / f"{settings.suite}.json", {"model": adapter.describe(), "settings": vars(settings), "items": everything}
            )
        del adapter, items  # the next model may need the memory
    if loaded and not having:
        raise UserError(f"No item of suite {settings.suite} contains {settings.only!r} in its name.")
    with _alone(out):
        write_report(out)
    print(f"written: {out / 'report.html'}, {out / 'report.md'}")
    if not loaded:
        raise UserError("None of the models could be loaded, so nothing was measured.")
    return int(not measured)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No other process gathers the items under OUT meanwhile: who is last reads all of them, and nobody who read fewer writes behind it."""
    held = lock(out, here=600.0, elsewhere=600.0, key="out")
    try:
        yield
    finally:
        (out / "lock").unlink(missing_ok=True)
        held.close()


def _not_loaded(name: str, path: str, error: Exception, precision: str, device: torch.device) -> dict[str, Any]:
    """The record of a model that could not be loaded, for the report; says why, and the other models go on."""
    known = isinstance(error, UserError)
    reason = str(error) if known else f"The model does not fit into the device's memory ({first_words(error)[:120]})."
    print(f"{name}: NOT MEASURED: {reason}", flush=True)
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


def _name(path: str, taken: dict[str, str], out: Path) -> str:
    """The last telling part of a path: run folders are called something, their checkpoints step-... A number where the name is taken, also by what
    an earlier command measured of another model."""
    parts = [p for p in Path(path).resolve().parts if p not in ("checkpoints", "/")]
    name = parts[-1] if not parts[-1].startswith("step-") or len(parts) < 2 else f"{parts[-2]}-{parts[-1]}"
    number, base = 2, name
    while name in taken or _of_another(out / name / "items", path):
        name, number = f"{base}-{number}", number + 1
    return name


def _of_another(items: Path, path: str) -> bool:
    """Whether the results in `items` are of another model than that of `path`, which is still where it was measured."""

    def home(folder: str | Path) -> Path:
        whole = Path(folder).resolve()
        return whole.parent.parent if whole.parent.name == "checkpoints" else whole

    record = next((record for file in sorted(items.glob("*.json")) if (record := read_record(file))), {})
    folder = record.get("model", {}).get("folder")
    return folder is not None and Path(folder).exists() and home(folder) != home(path)
