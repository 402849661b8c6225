"""ZeRO over the GPUs of one host against one GPU without ZeRO, and where a step's time goes.

    python -m scripts.bench.zero out=docs/results/step/zero.json [gpus=4] [seconds=200] [sizes=400m,1b] [models=...] [bf16=true]
    python -m scripts.bench.zero out=FILE toy=true gpus=2                # the same program in small, on CPU ranks

First the models on one GPU each, as many at a time as there are GPUs; then all GPUs together, one case after another in one process group, the most
wanted first: passes as CUDA graphs with gradients reduced once a step (`train.cuda_graph=all`), and DeepSpeed's own way. `efficiency` is tokens/s a
GPU over that of one GPU in the same call. A case that is profiled says how long kernels ran, how long only NCCL's did, and how long none.
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
    "steps": 12,  # of a case; the first third is not counted
    "toy": False,
}


def case(model: str, size: str, name: str, ranks: int, values: dict[str, Any], profile: bool, *more: str) -> dict[str, Any]:
    size, T = ("tiny", 64) if values["toy"] else (size, 2048)
    stage = int(name[4]) if name.startswith("zero") else 1
    return {
        "id": f"{model} {size} {name}", "kind": "train", "steps": values["steps"], "model": model, "size": size, "way": name, "profile": profile,
        "overrides": [*plain(model, size, stage, T, MICRO[size], MICRO[size] * ranks), *more], **({"vocabulary": 512} if values["toy"] else {}),
    }  # fmt: skip


GRAPH, WRITTEN, BF16 = "train.cuda_graph=all", "train.cuda_graph=off", "deepspeed.reduction=bf16"
# (how much it is wanted, name, settings, whether it is profiled for the first model)
WAYS: tuple[tuple[int, str, tuple[str, ...], bool], ...] = (
    (0, "zero1 graph bf16", (GRAPH, BF16), True),
    (0, "zero3", (WRITTEN,), True),
    (1, "zero1 deepspeed", (WRITTEN,), True),
    (1, "zero0 graph bf16", (GRAPH, BF16), True),
    (2, "zero1 graph", (GRAPH,), False),
    (2, "zero2 graph bf16", (GRAPH, BF16), False),
    (2, "zero3 bf16", (WRITTEN, BF16), False),
    (2, "zero0 graph", (GRAPH,), False),
    (2, "zero2 deepspeed", (WRITTEN,), False),
)


def cases(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all GPUs, the most wanted first: those of the first model and size."""
    models, sizes = values["models"].split(","), ["tiny"] if values["toy"] else values["sizes"].split(",")
    made = []
    for s, size in enumerate(sizes):
        for m, model in enumerate(models):
            for wanted, name, more, profile in WAYS:
                made.append(((wanted + s + (m > 0), wanted), case(model, size, name, values["gpus"], values, profile and not m, *more)))
    return [one for _, one in sorted(made, key=lambda item: item[0])]


def shown(row: dict[str, Any], alone: dict[str, Any] | None) -> str:
    rate, parts = row["tokens_per_second_per_gpu"], row.get("parts", {})
    words = [f"{row['id']}: {rate / 1e3:.1f}k tokens/s a GPU, step {1e3 * row['step_seconds']:.1f} ms, {row['memory_gib']:.1f} GiB"]
    if row.get("efficiency"):
        words.append(f"{row['efficiency']:.3f} of one")
    if alone is not None:
        words.append(f"losses within {max(abs(a - b) for a, b in zip(row['losses'], alone['losses'])):.1e} of zero1 deepspeed")
    words += [
        f"{key} {parts[key]}" for key in ("span_ms", "kernels_alone_ms", "nccl_ms", "nccl_alone_ms", "idle_ms", "nccl") if key in parts
    ]
    return ", ".join(words)


class Bench:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.end = values, time.monotonic() + values["seconds"]
        self.result: dict[str, Any] = {**environment(torch.device("cpu" if values["toy"] else "cuda")), "settings": values, "rows": []}
        self.workers: list[Worker] = []
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
            base = next((r for r in self.result["rows"] if (r["model"], r["size"]) == key and r["gpus"] == 1 and "error" not in r), None)
            if base is not None and ranks > 1:
                row["efficiency"] = row["tokens_per_second_per_gpu"] / base["tokens_per_second_per_gpu"]
            other = next(
                (r for r in self.result["rows"] if (r["model"], r["size"], r["way"]) == (*key, "zero1 deepspeed") and "losses" in r), None
            )
            print(shown(row, other), flush=True)
        with self.lock:
            self.result["rows"].append({**row, "gpus": ranks})
            write_json(Path(self.values["out"]), self.result)

    def started(self, ranks: int, **more: str) -> Worker:
        toy = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.values["toy"] else {}
        worker = Worker(ranks, {**ENVIRONMENT, **os.environ, **more, **toy})
        self.workers.append(worker)
        return worker

    def alone(self, gpu: int, given: list[dict[str, Any]]) -> None:
        """Cases on one GPU, which others use no more."""
        worker = self.started(1, CUDA_VISIBLE_DEVICES=str(gpu))
        for one in given:
            row = worker.run(one, self.wait)
            self.add(row, one, 1)
            if row is None:
                print(worker.said(), flush=True)
                break
        worker.close()
        self.workers.remove(worker)

    def run(self) -> None:
        values = self.values
        models, sizes = values["models"].split(","), ["tiny"] if values["toy"] else values["sizes"].split(",")
        each = [[case(model, size, "one GPU", 1, values, False) for size in sizes] for model in models]
        at_once = 1 if values["toy"] else values["gpus"]
        try:
            with ThreadPoolExecutor(at_once) as pool:
                for done in [pool.submit(self.alone, i % at_once, given) for i, given in enumerate(each)]:
                    done.result()
            together = None
            for one in cases(values):
                together = together or self.started(values["gpus"])
                row = together.run(one, self.wait)
                self.add(row, one, values["gpus"])
                if row is None:
                    print(together.said(), flush=True)
                    self.workers.remove(together)
                    together.kill()
                    together = None
        except TimeIsUp:
            print("The time is up.", flush=True)
        finally:
            for worker in self.workers:
                worker.close() if time.monotonic() < self.end else worker.kill()


def main(words: list[str]) -> None:
    values = parse_arguments(words, DEFAULTS)
    if not values["out"]:
        raise UserError("Name the JSON file to write: out=FILE.")
    Bench(values).run()


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
