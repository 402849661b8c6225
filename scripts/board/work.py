"""Runs the cells of a plan: several side by side on a device, each interruptible and going on where it was.

A process takes one cell after the other (scripts/board/queue.py) and imports, compiles and reads the corpus once; it keeps `streams` cells going, each on
a stream of its own, as a generator that hands the device some steps and yields. `workers` processes are spread over the GPUs. What is stopped, by time or by a kill, is a file under OUT/under_way; what is finished is a file in OUT/cells.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from scripts.board.order import READ0
from scripts.board.queue import Queue
from scripts.board.rates import outrun
from scripts.board.repeat import repeatable, source_hash
from scripts.board.results import OUTRUN, Cell, attempt, keep
from scripts.studies.workers import end_with_parent

SAVE_EVERY = 45.0  # seconds between two savings of a cell in training
POINTS = 100  # of the training curve
TURN = 4  # steps before another cell of the process has its turn


class Stopped(Exception):
    """Time is up; the cell has been saved as it is."""


def train(cell: Cell, values: dict[str, Any], device: Any) -> Generator[None, None, dict[str, Any]]:
    """One cell of text or of a task, from where it was stopped. Returns its result; raises Stopped when time is up."""
    from scripts.board.learner import Learner

    began = time.perf_counter()
    _peak(device)
    learner = Learner(cell.settings, values["data"], device)
    path = Path(values["out"]) / "under_way" / f"{cell.name}.safetensors"
    record: dict[str, Any] = {"curve": [], "clock": [], "seconds": 0.0, "stops": -1} | (learner.load(path) or {})
    record["stops"] += 1
    before = record["seconds"]
    phases = {"build": time.perf_counter() - began}
    attempt(Path(values["out"]), cell.name, "resumed" if record["stops"] else "begun", step=learner.done, of=learner.steps)
    start, saved = time.perf_counter() - record["seconds"], time.perf_counter()
    every, ended = max(1, learner.steps // POINTS), "tokens"
    asked: list[tuple[int, Callable[[], float]]] = []  # points of the curve whose losses are on their way

    def settle(left: int = 0) -> None:
        while len(asked) > left:
            at, read = asked.pop(0)
            record["curve"].append([at, read()])
            record["clock"].append(round(time.perf_counter() - start, 3))  # seconds at each point of the curve

    at = max((point[0] for point in record["curve"]), default=0)
    while learner.done < learner.steps and ended == "tokens":
        for done in learner.advance(min(learner.steps, at + every)):
            over, due = values["until"] and time.time() > values["until"], time.perf_counter() - saved > values["save_every"]
            if done < learner.steps and (over or due):
                settle()
                record["seconds"] = time.perf_counter() - start
                learner.save(path, record)
                saved = time.perf_counter()
                if over:
                    raise Stopped(f"stopped after step {done:,} of {learner.steps:,}")
            if done % TURN == 0:
                yield
        asked.append((learner.done, learner.loss_later(learner.done - at)))
        at = learner.done
        settle(left=int(learner.done < learner.steps))
        if record["curve"] and diverged(record["curve"], learner.steps):
            ended = "diverged"
        elif outrun(record["curve"], learner.steps, cell.settings["lr"], cell.rival):
            ended = OUTRUN
    record["seconds"] = time.perf_counter() - start
    result = record | {"ended": ended, "steps": learner.done, "tokens": learner.done * learner.B * learner.T}
    if ended == OUTRUN and cell.rival is not None:
        result["outrun_by"] = cell.rival.name
    with learner.trainer.here():
        sha256 = learner.sha256_later()
        result |= {
            "graphed": not learner.step.why_not,
            "unordered": learner.unordered,
            "beside": values.get("beside", 1),
            "peak_memory_bytes": _peak(device),
            "tokens_per_s": _speed(record["clock"], record["curve"], learner.B * learner.T),
        }
        phases |= {"train": record["seconds"] - before, "hash": time.perf_counter() - start - record["seconds"]}
        result |= {"measured": {} if ended == OUTRUN else _measured(cell, learner, values), "weights_sha256": sha256()}
        kept = cell.stage == "leaders" or values["weights"] and (reads_all(cell) and cell.stage != "stage0" or values["only"])
        if kept and cell.of_text() and ended == "tokens":
            write_folder(learner, Path(values["out"]) / "models" / cell.name, values["data"])
    took = time.perf_counter() - began
    phases["measure"] = took - sum(phases.values())
    result |= {"phases": {key: round(seconds, 3) for key, seconds in phases.items()}, "took": round(took, 3)}
    keep(Path(values["out"]), cell, result | {"environment": values["environment"]})
    path.unlink(missing_ok=True)
    return result


def _peak(device: Any) -> int | None:
    """The most memory that this process had on the device since it was asked last."""
    import torch

    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _speed(clock: list[float], curve: list[list[float]], tokens: int) -> float | None:
    """Median tokens/s between the points of the curve, those of the first tenth left out: kernels are compiled there, and the step is captured."""
    steps = [step for step, _ in curve][-len(clock) :]
    pairs = [((b - a) * tokens, end - start) for a, b, start, end in zip(steps, steps[1:], clock, clock[1:])][len(clock) // 10 :]
    return statistics.median(n / seconds for n, seconds in pairs if seconds > 0) if any(seconds > 0 for _, seconds in pairs) else None


def diverged(curve: list[list[float]], steps: int) -> bool:
    """Whether the loss is not finite, or at the end above what it was after a tenth of the steps."""
    if not math.isfinite(curve[-1][1]):
        return True
    early = next((loss for step, loss in curve if step >= steps / 10), None)
    return curve[-1][0] >= steps and early is not None and len(curve) > 10 and curve[-1][1] > early


def reads_all(cell: Cell) -> bool:
    """Whether more is read off a cell than its held-out loss: not off those of the grid, and in stages 0 and 1 and the full pass off one seed's."""
    few = ("stage0", "stage1", "pass")
    return cell.stage not in ("grid", "time0", "time1", *few) or cell.stage in few and cell.settings["seed"] == READ0


def _measured(cell: Cell, learner: Any, values: dict[str, Any]) -> dict[str, Any]:
    if cell.of_text():
        from scripts.board.measure import everything

        return everything(learner.model, values["data"], cell.settings, full=reads_all(cell))
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
    from scripts.board.learner import BETAS, GRAD_CLIP, WARMUP, WEIGHT_DECAY

    shards = ShardSet(data, "train")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().float().cpu().contiguous() for k, v in learner.model.named_parameters()}, folder / "model.safetensors")
    write_json(folder / "config.json", learner.settings["model"])
    (folder / "tokenizer.json").write_text(shards.tokenizer().to_str())
    write_json(folder / "tokenizer_config.json", shards.tokenizer_config())
    settings = learner.settings
    run = {"name": folder.name, "seed": settings["seed"], "data": {"path": data}}
    run["train"] = {"seq_len": learner.T, "global_batch": learner.B, "precision": settings["precision"]}
    run["optim"] = {
        "name": settings["optimizer"],
        "lr": settings["lr"],
        "betas": list(BETAS),
        "weight_decay": WEIGHT_DECAY,
        "grad_clip": GRAD_CLIP,
    }
    run["schedule"] = {"kind": "linear to nothing", "warmup": f"{WARMUP:.0%} of the steps"}
    write_json(folder / "run.json", run)
    write_json(folder / "state.json", {"step": learner.done, "tokens": learner.done * learner.B * learner.T})


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


def work(values: dict[str, Any], number: int = 0, fixed: list[Cell] | None = None) -> None:
    """Process `number`: takes cells until there are none or time is up. fixed: these, instead of those of the plan."""
    end_with_parent()
    device = repeatable(number, values["device"])
    import torch

    from training.watch.metrics import environment

    if values["workers"] > 1:
        torch.set_num_threads(1)
    values = values | {
        "environment": environment(device) | {"code": source_hash()},
        "beside": values["streams"] * _sharing(values["workers"], device) + values["others"],
    }
    place = (
        f"{device}.{os.environ.get('CUDA_VISIBLE_DEVICES', '')}"  # where a program sees some of the GPUs, its cuda:0 is another's cuda:1
    )
    queue = Queue(values, place.replace(":", "").replace(",", "-"), fixed)
    running: list[tuple[Cell, Any]] = []
    while True:
        while len(running) < values["streams"]:
            cell = None if any(cell.alone for cell, _ in running) else queue.take()
            if cell is None:
                break
            running.append((cell, KINDS.get(cell.stage, train)(cell, values, device)))
        if not running:
            return
        for entry in list(running):
            cell, generator = entry
            ended = _turn(cell, generator, values)
            if ended:
                running.remove(entry)
                queue.release(cell, failed=ended == "failed")
                del entry, generator
                gc.collect()  # a learner and its graph hold one another, and a good part of the device's memory
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def _sharing(workers: int, device: Any) -> int:
    """The processes that have the same device."""
    import torch

    return -(-workers // torch.cuda.device_count()) if device.type == "cuda" else workers


def _turn(cell: Cell, generator: Any, values: dict[str, Any]) -> str:
    """Lets a cell go on; how it ended, which is told and logged, empty while it has not."""
    out = Path(values["out"])
    try:
        next(generator)
        return ""
    except StopIteration as end:
        result = end.value
        told = {key: result[key] for key in ("ended", "seconds", "took", "tokens_per_s") if result.get(key) is not None}
        bits = ((result.get("measured") or {}).get("held_out") or {}).get("bits_per_byte")
        attempt(out, cell.name, "finished", **told, **({} if bits is None else {"bits_per_byte": bits}))
        figures = [f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items()]
        figures += [] if bits is None else [f"{bits:.4f} bits per byte"]
        print(f"{cell.name}: {', '.join(figures)}", flush=True)
        return "finished"
    except Stopped as why:
        attempt(out, cell.name, "stopped", why=str(why))
        print(f"{cell.name}: {why}", flush=True)
        return "stopped"
    except Exception as error:  # one cell's failure is its own; the next are run
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        attempt(out, cell.name, "failed", why=text, traceback=traceback.format_exc())
        print(f"{cell.name}: {text}", flush=True)
        return "failed"


def run_all(values: dict[str, Any]) -> None:
    """Runs the cells asked for and what follows from them, in values['workers'] processes."""
    Queue(values, "none").forgive()
    if values["workers"] == 1:
        return work(values)
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=work, args=(values, number)) for number in range(values["workers"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            print(f"A process ended with status {process.exitcode}; its cells go on from where they were saved.", flush=True)
