"""Runs the cells of a plan: several side by side on a device, each interruptible and going on where it was.

A process keeps `streams` cells going, each on a stream of its own, as a generator that hands the device some steps and yields; `workers` processes share
the device. What is stopped, by time or by a kill, is a file under OUT/under_way; what is finished is a file in OUT/cells.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

from scripts.board.results import Cell, attempt, keep

SAVE_EVERY = 45.0  # seconds between two savings of a cell in training
POINTS = 100  # of the training curve
TURN = 4  # steps before another cell of the process has its turn


class Stopped(Exception):
    """Time is up; the cell has been saved as it is."""


def train(cell: Cell, values: dict[str, Any], device: Any) -> Generator[None, None, dict[str, Any]]:
    """One cell of text or of a task, from where it was stopped. Returns its result; raises Stopped when time is up."""
    from scripts.board.learner import Learner

    learner = Learner(cell.settings, values["data"], device)
    path = Path(values["out"]) / "under_way" / f"{cell.name}.safetensors"
    record: dict[str, Any] = {"curve": [], "clock": [], "seconds": 0.0, "stops": -1} | (learner.load(path) or {})
    record["stops"] += 1
    attempt(Path(values["out"]), cell.name, "resumed" if record["stops"] else "begun", step=learner.done, of=learner.steps)
    start, saved = time.perf_counter() - record["seconds"], time.perf_counter()
    every, ended = max(1, learner.steps // POINTS), "tokens"
    at = max((point[0] for point in record["curve"]), default=0)
    while learner.done < learner.steps:
        for done in learner.advance(min(learner.steps, at + every)):
            over, due = values["until"] and time.time() > values["until"], time.perf_counter() - saved > values["save_every"]
            if done < learner.steps and (over or due):
                record["seconds"] = time.perf_counter() - start
                learner.save(path, record)
                saved = time.perf_counter()
                if over:
                    raise Stopped(f"stopped after step {done:,} of {learner.steps:,}")
            if done % TURN == 0:
                yield
        record["curve"].append([learner.done, learner.mean_loss(learner.done - at)])
        record["clock"].append(round(time.perf_counter() - start, 3))  # seconds at each point of the curve
        at = learner.done
        if diverged(record["curve"], learner.steps):
            ended = "diverged"
            break
    record["seconds"] = time.perf_counter() - start
    result = record | {"ended": ended, "steps": learner.done, "tokens": learner.done * learner.B * learner.T}
    with learner.trainer.here():
        result |= {
            "weights_sha256": learner.weights_sha256(),
            "graphed": not learner.step.why_not,
            "beside": values["streams"] * values["workers"],
        }
        result["measured"] = _measured(cell, learner, values)
        if values["weights"] and cell.of_text() and ended == "tokens":
            write_folder(learner, Path(values["out"]) / "models" / cell.name, values["data"])
    keep(Path(values["out"]), cell, result | {"environment": values["environment"]})
    path.unlink(missing_ok=True)
    return result


def diverged(curve: list[list[float]], steps: int) -> bool:
    """Whether the loss is not finite, or at the end above what it was after a tenth of the steps."""
    if not math.isfinite(curve[-1][1]):
        return True
    early = next((loss for step, loss in curve if step >= steps / 10), None)
    return curve[-1][0] >= steps and early is not None and len(curve) > 10 and curve[-1][1] > early


def _measured(cell: Cell, learner: Any, values: dict[str, Any]) -> dict[str, Any]:
    if cell.of_text():
        from scripts.board.measure import everything

        return everything(learner.model, values["data"], cell.settings, full=cell.stage != "grid")
    from evals.measures.tracking import accuracy_by_length

    settings = cell.settings
    return accuracy_by_length(
        learner.model, settings["task"], settings["lengths"], train_length=settings["T"], sequences=500, batch=250, seed=settings["seed"]
    )


def write_folder(learner: Any, folder: Path, data: str) -> None:
    """The trained model as a folder that evaluations and scripts/export.py read."""
    from safetensors.torch import save_file

    from data.files import write_json
    from data.shards import ShardSet

    shards = ShardSet(data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().float().cpu().contiguous() for k, v in learner.model.named_parameters()}, folder / "model.safetensors")
    write_json(folder / "config.json", learner.settings["model"])
    (folder / "tokenizer.json").write_text(shards.tokenizer().to_str())
    write_json(folder / "tokenizer_config.json", shards.tokenizer_config())
    write_json(folder / "run.json", {"train": {"seq_len": learner.T}, "data": {"path": data}})


def raced(cell: Cell, values: dict[str, Any], device: Any) -> Generator[None, None, dict[str, Any]]:
    """A cell of the speedrun: the seconds from the first step to the end of the last, kernels compiled and evaluation left out."""
    from scripts.board.learner import Learner
    from scripts.board.measure import everything

    attempt(Path(values["out"]), cell.name, "begun")
    for _ in Learner(cell.settings, values["data"], device).advance(8):
        pass
    learner = Learner(cell.settings, values["data"], device)
    learner.mean_loss(1)  # waits for the device
    start = time.perf_counter()
    for _ in learner.advance(learner.steps):
        pass
    loss = learner.mean_loss(learner.steps)
    result: dict[str, Any] = {"ended": "raced", "seconds": time.perf_counter() - start, "tokens": learner.steps * learner.B * learner.T}
    with learner.trainer.here():
        result |= {"mean_loss": loss, "weights_sha256": learner.weights_sha256(), "graphed": not learner.step.why_not}
        result["measured"] = everything(learner.model, values["data"], cell.settings, full=False)
    keep(Path(values["out"]), cell, result | {"environment": values["environment"]})
    yield
    return result


def timed(cell: Cell, values: dict[str, Any], device: Any) -> Generator[None, None, dict[str, Any]]:
    """A cell of the stage speed."""
    from scripts.board.speed import both

    attempt(Path(values["out"]), cell.name, "begun")
    result = both(cell.settings, values["data"], device)
    keep(Path(values["out"]), cell, {"ended": "timed", **result, "environment": values["environment"]})
    yield
    return result


KINDS = {"speed": timed, "speedrun": raced}


def repeatable(number: int, name: str) -> Any:
    """The device of process `number` (of several GPUs one after the other), set so that a cell gives the same bits again: attention's backward pass sums in
    a fixed order, and products have a work space of their own on every stream."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if name != "cuda":
        return torch.device(name)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def work(values: dict[str, Any], cells: list[Cell], taken: Any, streams: int, number: int = 0) -> None:
    """Process `number`: takes cells until there are none or time is up. `taken` counts those given out."""
    device = repeatable(number, values["device"])
    import torch

    from training.watch.metrics import environment

    if values["workers"] > 1:
        torch.set_num_threads(1)
    values = values | {"environment": environment(device)}
    running: list[tuple[Cell, Any]] = []
    more = True
    while more or running:
        while more and len(running) < streams:
            place = _take(taken)
            more = place < len(cells) and not (values["until"] and time.time() > values["until"] - values["least"])
            if more:
                cell = cells[place]
                running.append((cell, KINDS.get(cell.stage, train)(cell, values, device)))
        for entry in list(running):
            cell, generator = entry
            if _turn(cell, generator, values):
                running.remove(entry)
                del entry, generator
                gc.collect()  # a learner and its graph hold one another, and a good part of the device's memory
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _take(taken: Any) -> int:
    with taken.get_lock():
        taken.value += 1
        return int(taken.value) - 1


def _turn(cell: Cell, generator: Any, values: dict[str, Any]) -> bool:
    """Lets a cell go on; whether it came to an end, which is told and logged."""
    out = Path(values["out"])
    try:
        next(generator)
        return False
    except StopIteration as end:
        result = end.value
        told = {key: result[key] for key in ("ended", "seconds", "tokens_per_s") if key in result}
        bits = ((result.get("measured") or {}).get("held_out") or {}).get("bits_per_byte")
        attempt(out, cell.name, "finished", **told, **({} if bits is None else {"bits_per_byte": bits}))
        print(f"{cell.name}: {told}" + (f" {bits:.4f} bits per byte" if bits is not None else ""), flush=True)
    except Stopped as why:
        attempt(out, cell.name, "stopped", why=str(why))
        print(f"{cell.name}: {why}", flush=True)
    except Exception as error:  # one cell's failure is its own; the next are run
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        attempt(out, cell.name, "failed", why=text, traceback=traceback.format_exc())
        print(f"{cell.name}: {text}", flush=True)
    return True


def run_all(values: dict[str, Any], cells: list[Cell]) -> None:
    """Runs these cells; those that want the device for themselves come one by one, when no other is running."""
    together, alone = [c for c in cells if not c.alone], [c for c in cells if c.alone]
    spawn = multiprocessing.get_context("spawn")
    for group, workers, streams in ((together, values["workers"], values["streams"]), (alone, 1, 1)):
        workers = min(workers, len(group))
        taken = spawn.Value("i", 0)
        if workers == 1:
            work(values, group, taken, streams)
            continue
        processes = [spawn.Process(target=work, args=(values, group, taken, streams, number)) for number in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                print(f"A process ended with status {process.exitcode}; its cells go on from where they were saved.", flush=True)
