"""One cell in training: windows of text or samples of a task, a step as a CUDA graph (scripts/studies/trainer.py), and what makes a stop leave no trace.

All that decides the result is in the cell's settings. Step n reads samples n B to n B + B - 1 of a keyed order of the windows, so there is nothing to
replay. `save` writes weights, moments, the states that rows begin with, and the running sum of the loss; after `load` every number is the one of a
run without a stop, bit for bit. Legend: B rows of a batch, T tokens of a window.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import write_bytes
from data.order import Permutation
from data.shards import ShardSet
from data.synthetic import build_task
from data.synthetic.source import SyntheticReader
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.board.repeat import strictly
from scripts.studies.arms import tensors_of, with_tensors
from scripts.studies.graphed import Rate
from scripts.studies.trainer import Trainer
from training.initial_state import InitialStates
from training.optim import MuonWithAdamW
from training.schedule import lr_factor

BETAS, EPS, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
WARMUP = 0.05  # of the steps
HEAD_CHUNK = 16_384  # tokens whose logits are held at once
# Steps handed to the device before one waits for it: what other cells of the process do on the host meanwhile, it does not wait for.
AHEAD = 24


@functools.lru_cache(maxsize=2)
def text_on(data: str, span: int, device: str) -> Tensor:
    """The first `span` training tokens, int32 on the device; cells of a process share them."""
    shards = ShardSet(data, "train")
    return torch.from_numpy(np.asarray(shards.read(0, span)).astype(np.int32)).to(device)


@functools.lru_cache(maxsize=4)
def samples_on(mapping: str, T: int, seed: int, count: int, device: str) -> tuple[Tensor, Tensor]:
    """(inputs, labels) (count, T) of a task's training samples on the device."""
    reader, parts = SyntheticReader(build_task(json.loads(mapping)), T, seed), []
    for first in range(0, count, 50_000):
        rows = reader.labelled(np.arange(first, min(first + 50_000, count)))[:2]
        parts.append([torch.from_numpy(part.astype(np.int16)) for part in rows])
    inputs, labels = (torch.cat(column).to(device) for column in zip(*parts))
    return inputs, labels


class Learner:
    """A model in training on `device` as `settings` (scripts/board/plan.py) say. record: JSON-able progress of the caller, saved with it."""

    def __init__(self, settings: dict[str, Any], data: str, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.T, self.B, self.steps = settings["T"], settings["rows"], settings["steps"]
        # Logits that are kept go through a dozen passes of torch's over memory; made again they are one kernel. The same loss, a third less time.
        model = LanguageModel(replace(ModelConfig.from_dict(settings["model"]), recompute_head=True, head_chunk=HEAD_CHUNK))
        model.init_weights(settings["seed"])
        bf16 = settings["precision"] == "bf16"
        self.trainer = Trainer(model, device, lr=settings["lr"], betas=BETAS, weight_decay=WEIGHT_DECAY, grad_clip=GRAD_CLIP, bf16=bf16)
        self.model = self.trainer.model
        self.muon: MuonWithAdamW | None = None
        if settings["optimizer"] == "muon":
            self._take_muon()
        with self.trainer.here():
            self._source(data)
            # Of all steps at once, so that nothing is reckoned or sent between two steps.
            self.offsets = torch.from_numpy(self._offsets(0, self.steps).reshape(self.steps, self.B)).to(device)
            self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.initial = InitialStates(settings["initial"], seed=settings["seed"])
        self.template: Any = None  # the state that rows begin with; its tensors are inputs of the step
        self.done, self.unordered = 0, ""
        self.step = self.trainer.graph(self._step)
        self._waits: list[Any] = []

    def _take_muon(self) -> None:
        """Muon on the hidden matrices, with updates of the size that AdamW's have, and one rate for all."""
        lr = self.settings["lr"]
        with self.trainer.here():
            self.muon = MuonWithAdamW(self.model, lr=lr, muon_lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        self.trainer.optimizer = self.muon
        self.trainer.rate = Rate(self.muon, torch.device("cpu"))

    def _source(self, data: str) -> None:
        """What samples are read from, and the order in which."""
        settings, device = self.settings, str(self.device)
        if "task" in settings:
            mapping = json.dumps(settings["task"], sort_keys=True)
            self.samples = samples_on(mapping, self.T, settings["seed"], self.steps * self.B, device)
            return
        self.tokens = text_on(data, settings["span"], device)
        self.window = torch.arange(self.T + 1, device=self.device)
        self.windows = (settings["span"] - 1) // self.T

    def _offsets(self, number: int, count: int = 1) -> np.ndarray:
        """Where the rows of `count` steps from `number` (from 0) begin, one after the other: each pass over the windows in an order of its own."""
        k_N = np.arange(number * self.B, (number + count) * self.B)
        if "task" in self.settings:
            return k_N
        passes, place_N = np.divmod(k_N, self.windows)
        starts_N = np.empty_like(place_N)
        for one in np.unique(passes):
            chosen = passes == one
            starts_N[chosen] = _order(self.windows, self.settings["seed"], int(one))(place_N[chosen]) * self.T
        return starts_N

    def _step(self, offsets_B: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        """One step on the samples at these places, its sums in a fixed order: (loss, tensors of the state at the end). A model with an operation that has
        no such order is trained all the same, and `unordered` says so."""
        if not self.unordered:
            try:
                with strictly():
                    return self._taken(offsets_B, *before)
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                self.unordered = str(error).splitlines()[0]
        return self._taken(offsets_B, *before)

    def _taken(self, offsets_B: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        if "task" in self.settings:
            inputs, labels = (part[offsets_B].long() for part in self.samples)
        else:
            ids = self.tokens[offsets_B[:, None] + self.window].long()
            inputs, labels = ids[:, :-1], ids[:, 1:]
        state = with_tensors(self.template, before) if self.template is not None else None
        take = self.trainer.update if self.muon is None else self.trainer.gradients  # Muon reads its rate on the host, behind the graph
        loss, _, after = take(inputs, labels, state)
        self.loss_sum.add_(loss)
        return loss, *([t.detach() for t in tensors_of(after)] if after is not None else [])

    def _inputs(self, number: int) -> tuple[Tensor, ...]:
        self.template = self.initial.before(self.model, 0, self.B)
        return self.offsets[number], *(tensors_of(self.template) if self.template is not None else [])

    def rate(self, number: int) -> float:
        """Of step `number`, from 0: up in WARMUP of the steps, then down to nothing in a line."""
        return self.settings["lr"] * lr_factor(number, self.steps, kind="linear", warmup=max(1, round(WARMUP * self.steps)))

    def advance(self, until: int) -> Iterator[int]:
        """Takes the steps from where it is to number `until`; yields how many were taken after each. At most AHEAD of them are unfinished."""
        for number, (_, *after) in self.trainer.run(self.step, range(self.done, until), self.rate, self._inputs):
            if self.muon is not None:
                with self.trainer.here():
                    self.muon.step()
            if self.template is not None:
                self.initial.after(0, with_tensors(self.template, tuple(after)))
            self.done = number + 1
            if self.trainer.stream is not None and self.done % AHEAD == 0:
                self._waits.append(self.trainer.stream.record_event())
                if len(self._waits) > 1:
                    self._waits.pop(0).synchronize()
            yield self.done

    def mean_loss(self, steps: int) -> float:
        """Nats per label over the last `steps` steps, which it waits for; the sum begins anew."""
        return self.loss_later(steps)()

    def loss_later(self, steps: int) -> Callable[[], float]:
        """`mean_loss` of now, to be asked for when those steps are done, so that the device need not wait for the question."""
        with self.trainer.here():
            if self.trainer.stream is None:
                value, wait = self.loss_sum.clone(), lambda: None
            else:
                value = torch.empty((), dtype=torch.float64, pin_memory=True).copy_(self.loss_sum, non_blocking=True)
                wait = self.trainer.stream.record_event().synchronize
            self.loss_sum.zero_()

        def read() -> float:
            wait()
            return float(value) / steps

        return read

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step, by name; parts of it live in the optimizer, and are views of it."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.model.named_parameters()}
        names = {p: name for name, p in self.model.named_parameters()}
        for p, values in self.trainer.optimizer.state.items():
            tensors |= {f"moment.{key}.{names[p]}": value for key, value in values.items()}
        if self.muon is not None:
            tensors |= {f"momentum.{i}": value for i, (_, value) in enumerate(self.muon.momenta())}
        if self.initial.ended:
            tensors |= {f"state.{i}": value for i, value in enumerate(tensors_of(self.initial.ended[0]))}
        return tensors | {"loss_sum": self.loss_sum, "generator": self.initial.generator.get_state()}

    def save(self, path: Path, record: dict[str, Any]) -> None:
        """Everything to go on from here, in one file that is whole or not there."""
        with self.trainer.here():
            on_cpu = {key: value.detach().cpu().contiguous().clone() for key, value in self._tensors().items()}
        about = {"record": json.dumps({"settings": self.settings, "done": self.done, **record})}
        write_bytes(path, save(on_cpu, about))

    def load(self, path: Path) -> dict[str, Any] | None:
        """The record that `save` was given last, everything set back to that moment; None where there is no such file of these settings."""
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["record"])
                if record.pop("settings") != json.loads(json.dumps(self.settings)):
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is cut off or no saved cell; delete it, and the cell begins anew.") from error
        with self.trainer.here(), torch.no_grad():
            self._restore(tensors)
        self.done = record.pop("done")
        return record

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        by_name = dict(self.model.named_parameters())
        for name, p in by_name.items():
            p.copy_(tensors[f"weight.{name}"])
        for key, value in tensors.items():
            if key.startswith("moment."):
                _, what, name = key.split(".", 2)
                self.trainer.optimizer.state[by_name[name]][what] = value.to(self.device)
        for i, (_, momentum) in enumerate(self.muon.momenta() if self.muon is not None else []):
            momentum.copy_(tensors[f"momentum.{i}"])
        self.loss_sum.copy_(tensors["loss_sum"])
        self.initial.generator.set_state(tensors["generator"])
        states = [tensors[f"state.{i}"].to(self.device) for i in range(sum(key.startswith("state.") for key in tensors))]
        if states:
            template = self.model.init_state(self.B)
            self.initial.ended[0] = with_tensors(template, tuple(states))
            self.initial.mixers = [block.mixer for block in self.model.blocks]

    def sha256_later(self) -> Callable[[], str]:
        """Of all weights as they are now, by which two runs are known to be equal bit for bit; reckoned beside what the device does meanwhile."""
        copies = [(name, p.detach().float().cpu().contiguous().numpy()) for name, p in sorted(self.model.named_parameters())]

        def digest() -> str:
            made = hashlib.sha256()
            for name, values in copies:
                made.update(name.encode())
                made.update(values.reshape(-1))
            return made.hexdigest()

        pool = ThreadPoolExecutor(1)
        answer = pool.submit(digest)
        pool.shutdown(wait=False)
        return answer.result

    def weights_sha256(self) -> str:
        """`sha256_later`, at once."""
        return self.sha256_later()()


@functools.lru_cache(maxsize=64)
def _order(windows: int, seed: int, one: int) -> Permutation:
    return Permutation(windows, seed, one)
