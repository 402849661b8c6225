"""Writing checkpoints while training goes on.

A step waits only until its weights and moments lie in host memory (page-locked on a GPU); a thread writes them from there. Every rank
writes what it keeps (training/zero/local_state.py): nothing is gathered, so a rank needs 12 bytes a parameter, divided by the ranks, of host
memory, kept for the run. A rank's files are complete when its part-XXXXX.json lies beside them; rank 0 waits for all parts, checks that
every file is there in full, writes the index and the marker, renames the folder and drops older ones. The folder of a save is named after
a number that rank 0 drew at the start of the run, so that parts of a run that died cannot be taken for this one's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import write_json
from models.checkpoint import MARKER, checkpoints, digest, folder_of, order_of, step_of
from models.hub.weights import write_tensors
from training.config.schema import CheckpointSection
from training.engine import Engine
from training.errors import FULL, UserError
from training.saving.hook import Hook
from training.saving.kept import Kept
from training.zero.local_state import elements_to_write, to_write

POLL = 0.02  # seconds between looks at what other ranks have written
GRACE = 10.0  # seconds that a run which ends by an accident gives a write to finish


class HostMemory:
    """One block of host memory that snapshots are copied to. Page-locked on a GPU, so that copies run at the speed of the bus."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.block = torch.empty(0)
        self.locked = False

    def reserve(self, elements: int, lock: bool = False) -> None:
        """Room for `elements` fp32 numbers; takes seconds for gigabytes, so it is done before training where saves are to come."""
        if self.block.numel() >= elements:
            return
        self.release()
        self.block = torch.empty(elements)
        if lock and self.device.type == "cuda" and elements:  # torch's own pinned allocator would round up to a power of two
            done: Any = torch.cuda.cudart().cudaHostRegister(self.block.data_ptr(), self.block.nbytes, 0)
            self.locked = int(done) == 0

    def take(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of flat tensors, complete on return."""
        self.reserve(sum(t.numel() for t in tensors))
        copies, used = [], 0
        for tensor in tensors:
            copies.append(self.block[used : used + tensor.numel()])
            copies[-1].copy_(tensor, non_blocking=self.locked)
            used += tensor.numel()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copies

    def release(self) -> None:
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.block.data_ptr())
        self.block, self.locked = torch.empty(0), False


class Saver:
    """The checkpoints of a run. `save`, `finish` and `raise_together` are called by all ranks together; use it as a context."""

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        settings: CheckpointSection,
        documents: dict[str, str],
        say: Callable[[str], Any],
        minutes: float = 30.0,
        saved: int = 0,
        alive: Callable[[int], Any] = lambda saved: None,
        begun: Path | None = None,
    ) -> None:
        """say: where lines for people go; documents: text files that every checkpoint gets, by name; minutes: how long rank 0 waits for the others' parts; saved: the
        step of the checkpoint that the run started from; alive: called with the step of the newest checkpoint, now and then while the end of the run
        waits for the hook; begun: the checkpoint that the run started from, verified."""
        self.run_dir, self.engine, self.world, self.settings, self.documents = run_dir, engine, engine.world, settings, documents
        self.say, self.minutes, self.saved, self.alive = say, minutes, saved, alive
        self.token = f"{int(self.world.sum([float(secrets.randbits(40)) if self.world.main else 0.0])[0]):x}"
        self.memory = HostMemory(self.world.device)
        if settings.background and (settings.every or settings.milestones):
            with contextlib.suppress(RuntimeError):  # the first save tries again and says so on all ranks
                self.memory.reserve(elements_to_write(engine), lock=True)
        self.hook = Hook(settings.hook, run_dir / "hook.log", say) if settings.hook and self.world.main else None
        self.thread: threading.Thread | None = None
        self.cancel = threading.Event()
        self.problem = ""
        self.writing = -1  # the step that is being written
        self.numbers: list[dict[str, Any]] = []
        self.kept = Kept(run_dir, say)
        if self.world.main:
            if begun is not None:
                with contextlib.suppress(OSError):
                    self.kept.note_whole(begun)
            for left in (run_dir / "checkpoints").glob(".tmp-*"):  # of runs that died
                shutil.rmtree(left, ignore_errors=True)
            if self.hook is not None:
                self.hook.take_up(folder_of(run_dir, saved))

    def save(self, state: dict[str, Any]) -> None:
        """Takes the checkpoint of `state['step']`. Returns when its snapshot is taken and the one before is written; with
        checkpoint.background=false when it is written. Raises UserError on all ranks when one could not write."""
        started = time.perf_counter()
        self.finish()
        alone = time.perf_counter()
        self.writing = state["step"]
        try:
            arguments = self._snapshot(state)
        # memory, as a rule; the others hear of it where they next look, and end as well
        except (OSError, RuntimeError, MemoryError) as error:
            self.problem = f"rank {self.world.rank}: {error}"
        else:
            now = time.perf_counter()
            times = {"started": started, "save_wait": now - started, "save_snapshot": now - alone}
            self.thread = threading.Thread(target=self._work, args=(*arguments, times), name="checkpoint", daemon=True)
            self.thread.start()
        if not self.settings.background:
            self.finish()

    def _snapshot(
        self, state: dict[str, Any]
    ) -> tuple[list[tuple[str, str, int, Tensor]], dict[str, list[int]], dict[str, Any], dict[str, Tensor]]:
        """What the thread writes: copies of this rank's stretches, the shapes of all parameters, the state and the random states."""
        live = list(to_write(self.engine))
        copies = self.memory.take([s.values for _, s in live])
        stretches = [(kind, s.name, s.first, copy) for (kind, s), copy in zip(live, copies)]
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        steps = self.engine.optimizer_steps()
        state = {**state, "optimizer_steps": steps, "world_size": self.world.size, "zero_stage": self.engine.stage}
        return stretches, {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.engine.parameters.items()}, state, rng

    def finish(self) -> None:
        """Waits until what is being written is complete. Raises UserError on all ranks when one could not write."""
        while True:
            running = self.thread is not None and self.thread.is_alive()
            still, broken = self.world.sum([float(running), float(bool(self.problem))])
            if broken:
                self.raise_together()
            if not still:
                self._settle()
                return
            time.sleep(POLL)

    def raise_together(self) -> None:
        """Ends a save that failed on some rank, on every rank, and raises its sentence."""
        problem = next(text for text in self.world.texts(self.problem) if text)
        self.cancel.set()
        if self.thread is not None:
            self.thread.join()
        self.world.barrier()
        if self.world.main:
            shutil.rmtree(self._temporary(self.writing), ignore_errors=True)
        full = any(os.strerror(number) in problem for number in FULL)
        advice = f"free space on the disk of {self.run_dir}" if full else f"see to {self.run_dir}"
        raise UserError(f"The checkpoint of step {self.writing} could not be written ({problem}); {advice} and run again.")

    def _settle(self) -> None:
        if self.thread is not None and not self.thread.is_alive() and (folder_of(self.run_dir, self.writing) / MARKER).exists():
            self.saved, self.thread = self.writing, None

    def news(self) -> list[dict[str, Any]]:
        """The saves that were completed since the last call, a row each; on other ranks than 0 none.

        saved_step: the step it is of. save_wait: seconds that the step waited for it, of which save_snapshot went into the copy to host memory
        and the rest into waiting for the save before it. save_seconds: from its beginning until the checkpoint was complete; save_bytes: its size.
        """
        self._settle()
        rows = [self.numbers.pop(0) for _ in range(len(self.numbers))]
        for row in rows:
            folder = folder_of(self.run_dir, row["saved_step"])
            self.say(f"saved {folder}: step waited {row['save_wait']:.3f} s, written in {row['save_seconds']:.2f} s")
        return rows

    def _temporary(self, step: int) -> Path:
        final = folder_of(self.run_dir, step)
        return final.with_name(f".tmp-{final.name}-{self.token}")

    def _work(
        self,
        stretches: list[tuple[str, str, int, Tensor]],
        shapes: dict[str, list[int]],
        state: dict[str, Any],
        rng: dict[str, Tensor],
        times: dict[str, float],
    ) -> None:
        """The thread: this rank's files, and on rank 0 what makes them a checkpoint."""
        folder = self._temporary(state["step"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files, parts = self._write_tensors(folder, stretches, shapes)
            if self.world.main:
                files["rng.safetensors"] = write_tensors(folder / "rng.safetensors", rng, self.cancel)
                for name, text in {**self.documents, "state.json": json.dumps(state, indent=1) + "\n"}.items():
                    (folder / name).write_text(text)
                    files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
            for name in files:
                _sync(folder / name)
            write_json(folder / _part(self.world.rank), {"files": files, "parts": parts})
            if self.world.main:
                self._complete(folder, state["step"], shapes, times)
        except Exception as error:  # whatever it is, the run has to hear of it
            self.problem = f"rank {self.world.rank}: {getattr(error, 'strerror', None) or error}"

    def _write_tensors(
        self, folder: Path, stretches: list[tuple[str, str, int, Tensor]], shapes: dict[str, list[int]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Writes this rank's model and optimizer files; returns what the marker and the indices say of them."""
        files: dict[str, Any] = {}
        parts: dict[str, Any] = {"model": [], "optimizer": []}
        for kind, entries in parts.items():
            file = (
                f"{kind}.safetensors" if self.world.size == 1 else f"{kind}-{self.world.rank + 1:05d}-of-{self.world.size:05d}.safetensors"
            )
            mine = [(name, first, values) for k, name, first, values in stretches if k == kind]
            by_name: dict[str, list[Tensor]] = {}
            for name, _, values in mine:
                by_name.setdefault(name, []).append(values)
            joined = {name: _joined(several) for name, several in by_name.items()}
            tensors = {name: t.view(shapes[_parameter(kind, name)]) if self.world.size == 1 else t for name, t in joined.items()}
            files[file] = write_tensors(folder / file, tensors, self.cancel)
            entries += [[name, file, first, first + values.numel()] for name, first, values in mine]
        return files, parts

    def _complete(self, folder: Path, step: int, shapes: dict[str, list[int]], times: dict[str, float]) -> None:
        """Rank 0: collects the parts, writes indices and marker, renames, drops what is too old. Raises OSError until the checkpoint has its name;
        what goes wrong after that is told, as the run has lost nothing."""
        files: dict[str, Any] = {}
        tensors: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
        for rank in range(self.world.size):
            part = self._await_part(folder / _part(rank), rank)
            files |= part["files"]
            for kind, entries in part["parts"].items():
                for name, file, first, end in entries:
                    entry = tensors[kind].setdefault(name, {"shape": shapes[_parameter(kind, name)], "parts": []})
                    entry["parts"].append([file, first, end])
            (folder / _part(rank)).unlink()
        if self.world.size > 1:
            for kind, table in tensors.items():
                path = folder / f"{kind}.index.json"
                path.write_text(json.dumps({"tensors": table}))  # compact: there may be a part for every tensor and rank
                files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
                _sync(path)
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise OSError(f"{name} has {size} bytes instead of {entry['bytes']}")
        order = 1 + max((order_of(other) for other in checkpoints(self.run_dir)), default=0)
        write_json(folder / MARKER, {"format": 2, "order": order, "files": files})
        _sync(folder / MARKER)
        _sync(folder)
        final = folder_of(self.run_dir, step)
        gone = _set_aside(final) if final.exists() else None  # of another branch of the run, or damaged
        os.replace(folder, final)
        if gone is not None:
            shutil.rmtree(gone, ignore_errors=True)
        times["save_seconds"] = time.perf_counter() - times.pop("started")
        self.numbers.append({"saved_step": step, **times, "save_bytes": sum(entry["bytes"] for entry in files.values())})
        if self.hook is not None:
            self.hook.add(final)
        try:
            self.kept.note_whole(final)
            _sync(final.parent)
            self._drop_old()
        except OSError as error:
            self.say(f"an older checkpoint than {final.name} could not be dropped ({error.strerror}); the run goes on.")

    def _await_part(self, path: Path, rank: int) -> dict[str, Any]:
        end = time.monotonic() + 60 * self.minutes
        while not path.exists():
            if self.cancel.is_set():
                raise OSError("given up")
            if time.monotonic() > end:
                raise OSError(f"rank {rank} wrote no part of it within {self.minutes:g} minutes")
            os.listdir(path.parent)  # has a network disk look again
            time.sleep(POLL)
        return json.loads(path.read_text())

    def _drop_old(self) -> None:
        for folder in self.kept.too_old(self.settings.keep):
            if step_of(folder) not in self.settings.milestones and not (self.hook is not None and self.hook.needs(folder)):
                shutil.rmtree(_set_aside(folder), ignore_errors=True)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finishes what is being written. After an accident on this rank or another it only waits a little: no rank may be sure of the others."""
        agreed = kind is None or issubclass(kind, UserError)
        if self.thread is not None and not self.problem:
            self.thread.join(None if agreed else GRACE)
        self.cancel.set()
        if self.hook is not None:
            self.hook.close(60 * self.settings.hook_minutes if agreed else 0.0, lambda: self.alive(self.saved))
            with contextlib.suppress(OSError):
                self._drop_old()
        if self.thread is None or not self.thread.is_alive():
            self.memory.release()


def _set_aside(folder: Path) -> Path:
    """A checkpoint that is to go, renamed first: an interrupted removal leaves what nobody takes for one and the next run removes. Raises OSError."""
    gone = folder.with_name(f".tmp-dropped-{folder.name}-{secrets.token_hex(4)}")
    os.replace(folder, gone)
    return gone


def _part(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _parameter(kind: str, name: str) -> str:
    """The parameter whose moment is called exp_avg.NAME."""
    return name if kind == "model" else name.partition(".")[2]


def _joined(copies: list[Tensor]) -> Tensor:
    """Copies that lie one behind the other in host memory, as one tensor."""
    first, elements = copies[0], sum(copy.numel() for copy in copies)
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in zip(copies, copies[1:])):
        return torch.cat(copies)
    return first.as_strided((elements,), (1,))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
