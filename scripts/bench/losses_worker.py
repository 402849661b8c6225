"""Losses of a model's first steps, for two commits or two settings to be compared: the same weights, rows and rates for every run of a seed.

    python scripts/bench/losses_worker.py '{"tokens": "FILE.bin", "out": "FILE.json", "name": "transformer-400m", "arm": "plain", "seeds": [0, 1, 2]}'

runs with the code of any commit in PYTHONPATH, as scripts/bench/step_worker.py does. arm: `plain`; `flash` or `efficient`, torch's other kernels of
attention, which differ by rounding alone, and so tell how far runs of one commit lie apart; `narrow`, a residual stream of 16 bits; `fp8`.
held_out: so many batches of `held_out_tokens`, another file, behind the last step. graph: passes are replayed as a CUDA graph, on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ARMS = ("plain", "flash", "efficient", "narrow", "fp8")
SETTINGS: dict[str, Any] = {
    "vocabulary": 4096,
    "rows": 8,
    "length": 512,
    "steps": 200,
    "warm_up": 100,
    "lr": 1e-4,
    "held_out": 0,
    "held_out_tokens": "",
    "graph": False,
}


def beside(name: str) -> Any:
    """A file of this folder, whatever `scripts` is in PYTHONPATH."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(tokens: Any, seed: int, step: int, rows: int, length: int, device: torch.device) -> Tensor:
    """(rows, length + 1) of a step of a seed, from any place of the file."""
    draws = torch.Generator().manual_seed(1_000_003 * seed + step)
    firsts = torch.randint(len(tokens) - length - 1, (rows,), generator=draws)
    return torch.stack([torch.from_numpy(tokens[f : f + length + 1].astype(numpy.int64)) for f in firsts.tolist()]).to(device)


def built(name: str, vocabulary: int, seed: int, device: torch.device, step_worker: Any) -> Any:
    """As step_worker's, of fields that every commit has, and another vocabulary."""
    from models.config import ModelConfig
    from models.lm import LanguageModel

    family, _, size = name.partition("-")
    width, layers, _, heads, _, _ = step_worker.SIZES[size]
    mixer = {"transformer": {"type": "attention", "n_heads": heads}, "paragru": {"type": "rnn", "cell": "paragru", "n_heads": 4}}[family]
    model = LanguageModel(
        ModelConfig(vocabulary, width, layers, [family], {family: mixer}, d_ff=-1, learnable_residual=family == "paragru")
    )
    model.init_weights(seed)
    return model.to(device)


def replays_of(model: Any, device: torch.device) -> Any:
    """A function that replays the pass of rows and returns their mean loss, or None where they have to run as written."""
    from data.loader import Batch
    from training.graph import GraphedPass

    graphed = GraphedPass(model, device, autocast=True)

    def replayed(ids: Tensor) -> Tensor | None:
        given, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        loss_sum = graphed.run(Batch(given, labels, None, [0] * len(ids)), 1 / labels.numel())
        if graphed.why_not:
            raise RuntimeError(graphed.why_not)
        return None if loss_sum is None else (loss_sum / labels.numel()).float()

    return replayed


def trained(given: dict[str, Any], seed: int, arm: str, step_worker: Any, kept: Any) -> None:
    """Hands `kept` the losses and norms so far, every fifty steps and at the end."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = numpy.memmap(given["tokens"], dtype=numpy.uint16, mode="r")
    model = built(given["name"], given["vocabulary"], seed, device, step_worker)
    if arm == "narrow":
        model.residual_dtype = torch.bfloat16
    if arm == "fp8":
        from kernels.linear import float8

        float8.wanted = True
    ahead, update, optimizer = step_worker.update_of(model, "adamw", True)
    attention: Any = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}.get(arm)
    losses: list[Tensor] = []
    began, numbers = time.perf_counter(), given["rows"] * given["length"]
    graphed = replays_of(model, device) if given["graph"] and device.type == "cuda" else lambda ids: None

    def keep(**more: Any) -> None:
        kept({"losses": [round(x, 5) for x in torch.stack(losses).tolist()], "seconds": round(time.perf_counter() - began, 1), **more})

    def passed(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16), nullcontext() if attention is None else sdpa_kernel(attention):
            loss: Tensor = model(ids[:, :-1], labels=ids[:, 1:].contiguous()).loss_sum / numbers
            return loss

    def rows(step: int, tokens: Any = tokens) -> Tensor:
        return rows_of(tokens, seed, step, given["rows"], given["length"], device)

    for step in range(1, given["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = given["lr"] * min(1.0, step / given["warm_up"])
        optimizer.zero_grad(set_to_none=True)
        ids = rows(step)
        loss = graphed(ids)
        if loss is None:
            loss = passed(ids)
            loss.backward()
        losses.append(loss.detach())
        ahead(losses[-1])
        update()
        if step % 50 == 0 or step == given["steps"]:
            keep()
    with torch.no_grad():
        apart = numpy.memmap(given["held_out_tokens"] or given["tokens"], dtype=numpy.uint16, mode="r")
        held = [float(passed(rows(-1 - i, apart))) for i in range(given["held_out"])]
    keep(held_out=held)


def main(given: dict[str, Any]) -> None:
    given = {**SETTINGS, **given}
    if given["arm"] not in ARMS:
        sys.exit(f"The arm is {given['arm']!r}; choose one of {', '.join(ARMS)}.")
    step_worker, out = beside("step_worker"), Path(given["out"])
    result: dict[str, Any] = {"settings": given, "torch": torch.__version__, "runs": {}}
    result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for seed in given["seeds"]:

        def kept(run: dict[str, Any], seed: int = seed) -> None:
            result["runs"][str(seed)] = run
            out.write_text(json.dumps(result))

        trained(given, seed, given["arm"], step_worker, kept)


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] else 2)
    main(json.loads(sys.argv[1]))
