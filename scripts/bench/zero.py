"""ZeRO over the GPUs of one host against one GPU without ZeRO, and where a step's time goes.

    python -m scripts.bench.zero out=docs/results/zero/h200_2.json [gpus=4] [seconds=200] [sizes=400m,1b] [models=...]
    python -m scripts.bench.zero out=FILE "ways=1b zero1 graph bf16,hybrid 400m zero1 graph bf16"   # these, in this order
    python -m scripts.bench.zero out=FILE toy=true gpus=2                # the same program in small, on CPU ranks

First all kernels are compiled, by a few layers of each model and size in processes of their own. Then a size after the other: the models on one GPU
each, as many at a time as there are GPUs, one of them on every GPU; then all GPUs together, one case after another in one process group, the
most wanted first: passes as CUDA graphs with gradients reduced once a step (`train.cuda_graph=all`; under ZeRO-3 weights gathered once a step as
well, `deepspeed.gather=step`), and DeepSpeed's own way. Steps follow each other as in training; their median counts, as one of a dozen may take half
a second longer (`longest_step_seconds`). `efficiency` is tokens/s a GPU over that of one GPU in the same call, the mean of those measured. A row says
whether passes were replayed (`news`) and what torch's allocator held; one that is profiled says for how long kernels ran, only NCCL's did, and none.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from scripts.bench.multi_gpu import ENVIRONMENT, TimeIsUp, Worker
from scripts.bench.multi_gpu_cases import MICRO, MODELS, plain
from training.config.arguments import parse_arguments, program
from training.errors import UserError
from training.watch.metrics import environment

DEFAULTS: dict[str, Any] = {
    "out": "",  # JSON to write
    "gpus": 4,
    "seconds": 1800.0,  # after which no case begins
    "sizes": "400m,1b",
    "models": ",".join(MODELS),
    "ways": "",  # only these in this order, by the ends of their rows' names: "zero3,hybrid 400m zero1 graph bf16"
    "every": "",  # measured alone on every GPU, by which cards can be compared: "hybrid 400m"; or else the first model of the first size
    "steps": 18,  # of a case; the first third is not counted
    "toy": False,
}


def case(model: str, size: str, name: str, ranks: int, values: dict[str, Any], profile: bool, *more: str) -> dict[str, Any]:
    size, T = ("tiny", 64) if values["toy"] else (size, 2048)
    stage = int(name[4]) if name.startswith("zero") else 1
    return {
        "id": f"{model} {size} {name}", "kind": "train", "steps": values["steps"], "model": model, "size": size, "way": name, "profile": profile,
        "overrides": [*plain(model, size, stage, T, MICRO[size], MICRO[size] * ranks), *more], **({"vocabulary": 512} if values["toy"] else {}),
    }  # fmt: skip


GRAPH, WRITTEN, BF16, STEP = "train.cuda_graph=all", "train.cuda_graph=off", "deepspeed.reduction=bf16", "deepspeed.gather=step"
BOTH = MODELS[:2]
WARM = 3, ("size.n_layers=4", "size.n_layers_no_mlp=2")  # steps and depth that compile all of a model's kernels
# (0: of a size before the next one begins, 1: after all sizes; name, settings, models, those of them that are profiled), the most wanted first
WAYS: tuple[tuple[int, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (0, "zero1 graph bf16", (GRAPH, BF16), MODELS, MODELS),
    (0, "zero3 step graph bf16", (GRAPH, BF16, STEP), BOTH, MODELS[:1]),
    (0, "zero2 graph bf16", (GRAPH, BF16), MODELS[:1], ()),
    (0, "zero3", (WRITTEN,), MODELS[:1], MODELS[:1]),
    (1, "zero3 step graph bf16", (GRAPH, BF16, STEP), MODELS[2:], ()),
    (1, "zero3 step", (WRITTEN, BF16, STEP), MODELS[:1], ()),
    (1, "zero3", (WRITTEN,), MODELS[1:], ()),
    (1, "zero1 deepspeed", (WRITTEN,), MODELS[:1], MODELS[:1]),
    (1, "zero1 graph", (GRAPH,), MODELS[:1], ()),
    (1, "zero2 graph bf16", (GRAPH, BF16), MODELS[1:], ()),
    (1, "zero0 graph bf16", (GRAPH, BF16), MODELS[:1], ()),
    (1, "zero2 deepspeed", (WRITTEN,), MODELS[:1], ()),
)


def sizes_of(values: dict[str, Any]) -> list[str]:
    return ["tiny"] if values["toy"] else values["sizes"].split(",")


def cases(values: dict[str, Any], size: str, first: bool) -> list[dict[str, Any]]:
    """Of a size on all GPUs, the most wanted first. first: those that come before the next size, else the others."""
    return [
        case(model, size, name, values["gpus"], values, model in profiled, *more)
        for later, name, more, models, profiled in WAYS
        for model in values["models"].split(",")
        if model in models and (later == 0) == first
    ]


def chosen(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that `ways` names, of any model. Raises UserError for an end that no case has."""
    every = [
        case(model, size, name, values["gpus"], values, model in profiled, *more)
        for size in sizes_of(values)
        for _, name, more, _, profiled in {row[1]: row for row in reversed(WAYS)}.values()
        for model in values["models"].split(",")
    ]
    found = [[one for one in every if f" {one['id']}".endswith(f" {end.strip()}")] for end in values["ways"].split(",")]
    if not all(found):
        ends = [end for end, cases in zip(values["ways"].split(","), found) if not cases]
        raise UserError(f"No case is called {ends[0].strip()!r}; ways= takes ends of: {', '.join(one['id'] for one in every)}.")
    return list({one["id"]: one for cases in found for one in cases}.values())


def shown(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    rate, parts = row["tokens_per_second_per_gpu"], row.get("parts", {})
    words = [f"{row['id']}: {rate / 1e3:.1f}k tokens/s a GPU, step {1e3 * row['step_seconds']:.1f} ms, {row['memory_gib']:.1f} GiB"]
    words += [f"of {row['reserved_gib']:.1f}, {row['alloc_retries']} retries"] if "reserved_gib" in row else []
    words += [sentence[:160] for sentence in row.get("news", [])]
    if row.get("efficiency"):
        words.append(f"{row['efficiency']:.3f} of one")
    if other is not None:
        words.append(f"losses within {max(abs(a - b) for a, b in zip(row['losses'], other['losses'])):.1e} of {other['way']}")
    words += [
        f"{key} {parts[key]}" for key in ("span_ms", "kernels_alone_ms", "nccl_ms", "nccl_alone_ms", "idle_ms", "nccl") if key in parts
    ]
    return ", ".join(words)


class Bench:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.end = values, time.monotonic() + values["seconds"]
        self.result: dict[str, Any] = {**environment(torch.device("cpu" if values["toy"] else "cuda")), "settings": values, "rows": []}
        self.workers: list[Worker] = []
        self.all: Worker | None = None  # on all GPUs
        self.lock = threading.Lock()  # rows come from several threads

    def wait(self) -> None:
        for worker in list(self.workers):
            worker.alive()
        if time.monotonic() > self.end:
            raise TimeIsUp
        time.sleep(0.02)

    def add(self, row: dict[str, Any] | None, given: dict[str, Any], ranks: int) -> None:
        if row is None:
            row = {**given, "error": "the worker ended"}
            print(given["id"], row["error"], flush=True)
        else:
            key = (given["model"], given["size"])
            alone = [
                r["tokens_per_second_per_gpu"]
                for r in self.result["rows"]
                if (r["model"], r["size"]) == key and r["gpus"] == 1 and "error" not in r
            ]
            if alone and ranks > 1:
                row["efficiency"] = row["tokens_per_second_per_gpu"] / (sum(alone) / len(alone))
            others = (r for r in self.result["rows"] if (r["model"], r["size"]) == key and r["gpus"] == ranks > 1 and "losses" in r)
            print(shown(row, next(others, None)), flush=True)
        with self.lock:
            self.result["rows"].append({**row, "gpus": ranks})
            write_json(Path(self.values["out"]), self.result)

    def started(self, ranks: int, **more: str) -> Worker:
        toy = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.values["toy"] else {}
        worker = Worker(ranks, {**ENVIRONMENT, **os.environ, **more, **toy})
        self.workers.append(worker)
        return worker

    def lost(self, worker: Worker) -> None:
        print(worker.said(), flush=True)
        self.workers.remove(worker)
        worker.kill()

    def of(self, gpu: int, size: str) -> list[str]:
        """The models that are measured alone on a GPU."""
        return self.models[size][gpu :: len(self.visible())]

    def warm(self, worker: Worker, gpu: int, size: str) -> None:
        """Compiles the kernels of a GPU's models. Beside the other sizes, so no time is taken."""
        steps, depth = WARM
        for model in self.of(gpu, size):
            one = case(model, size, "one GPU", 1, self.values, False)
            if worker.run({**one, "steps": steps, "overrides": [*one["overrides"], *depth]}, self.wait) is None:
                return self.lost(worker)

    def alone(self, worker: Worker, gpu: int, size: str) -> None:
        """A size's models on one GPU, and what is measured on every GPU."""
        first = next(size for size in self.models if self.models[size])
        own, every = self.of(gpu, size), self.values["every"] or f"{self.models[first][0]} {first}"
        for model in own + [model for model in self.models[size] if f"{model} {size}" == every and model not in own]:
            if worker not in self.workers:
                return
            one = case(model, size, "one GPU", 1, self.values, True)
            row = worker.run(one, self.wait)
            self.add(row if row is None else {**row, "gpu": gpu}, one, 1)
            if row is None:
                self.lost(worker)

    def together(self, given: list[dict[str, Any]]) -> None:
        """Cases on all GPUs; the worker of those before is taken, unless it died."""
        for one in given:
            worker = self.all or self.started(self.values["gpus"])
            row = worker.run(one, self.wait)
            self.all = worker if row is not None else None
            self.add(row, one, self.values["gpus"])
            if row is None:
                self.lost(worker)

    def run(self) -> None:
        """All cases. Raises UserError before the first where `ways` names what is not there."""
        values, sizes = self.values, sizes_of(self.values)
        named = chosen(values) if values["ways"] else []
        self.models = {size: values["models"].split(",") for size in sizes}
        if named:
            self.models = {
                size: [m for m in self.models[size] if any((c["model"], c["size"]) == (m, size) for c in named)] for size in sizes
            }
        try:
            workers = {size: [self.started(1, CUDA_VISIBLE_DEVICES=gpu) for gpu in self.visible()] for size in sizes}
            self.all = self.started(values["gpus"])  # imports meanwhile
            with ThreadPoolExecutor(len(sizes) * values["gpus"]) as pool:
                done = [pool.submit(self.warm, worker, gpu, size) for size in sizes for gpu, worker in enumerate(workers[size])]
                for one in done:
                    one.result()
            for size in sizes:
                with ThreadPoolExecutor(values["gpus"]) as pool:
                    done = [pool.submit(self.alone, worker, gpu, size) for gpu, worker in enumerate(workers[size])]
                    for one in done:
                        one.result()
                if not named:
                    self.together(cases(values, size, True))
            for size in sizes:
                self.together([] if named else cases(values, size, False))
            self.together(named)
        except TimeIsUp:
            print("The time is up.", flush=True)
        finally:
            for worker in self.workers:
                worker.close() if time.monotonic() < self.end else worker.kill()

    def visible(self) -> list[str]:
        """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
        given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return (given or [str(gpu) for gpu in range(self.values["gpus"])])[: 1 if self.values["toy"] else self.values["gpus"]]


def main(words: list[str]) -> None:
    values = parse_arguments(words, DEFAULTS)
    if not values["out"]:
        raise UserError("Name the JSON file to write: out=FILE.")
    Bench(values).run()


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
