"""Decoding speed: tokens/s, the share of what reading the weights once a step allows, and state bytes per sequence.

    python scripts/bench_decode.py [out=docs/results/decode.json] [seconds=60] [only=paragru-400m] [compiled=false] [toy=true]

Random weights in bf16 (the recurrences' own parameters in fp32), one step as a CUDA graph, greedy. The time of a step does
not depend on what was read, so a state is made by reading 64 tokens, and an attention cache is filled to 1k or 128k with random numbers.
Before timing, the decoder's logits are compared with the model's own.
compiled=true lets torch.compile fuse the step first. An item that does not fit in memory says so. The JSON is written after every item. toy=true runs small models on any machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.config import ModelConfig  # noqa: E402
from models.decode import Decoder, cast  # noqa: E402
from models.lm import LanguageModel  # noqa: E402

# As configs/size and configs/model have them: width, layers, layers without an MLP, attention heads, Mamba-2 state.
SIZES = {"400m": (1024, 24, 48, 8, 64), "1b": (2048, 24, 48, 16, 128), "toy": (64, 2, 4, 4, 16)}
VOCABULARY = 50304


def config_of(family: str, size: str) -> ModelConfig:
    width, layers, layers_bare, heads, d_state = SIZES[size]
    mixer: dict[str, Any] = {
        "paragru": {"type": "rnn", "cell": "paragru", "n_heads": 4},
        "mamba2": {"type": "mamba2", "d_state": d_state, "chunk": 64},
        "transformer": {"type": "attention", "n_heads": heads},
    }[family]
    bare = family == "mamba2"
    return ModelConfig(
        vocab_size=VOCABULARY if size != "toy" else 512,
        d_model=width,
        n_layers=layers_bare if bare else layers,
        pattern=[family],
        mixers={family: mixer},
        d_ff=0 if bare else -1,
        learnable_residual=family == "paragru",
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy, read and write counted."""
    n = 1 << 30 if device.type == "cuda" else 1 << 24
    a, b = torch.zeros(n, dtype=torch.uint8, device=device), torch.zeros(n, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(10):
        wait(device)
        begin = time.perf_counter()
        b.copy_(a)
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n / best


@torch.no_grad()
def state_at(model: LanguageModel, batch: int, context: int) -> Any:
    """The state after a short text, caches filled up to `context`."""
    device = model.embedding.weight.device
    ids = torch.randint(model.config.vocab_size, (batch, min(context, 64)), device=device)
    state = model(ids, state=model.init_state(batch), last_only=True).state
    for part in state.layers:
        if hasattr(part, "k_BGLK"):
            B, G, _, K = part.k_BGLK.shape
            for name in ("k_BGLK", "v_BGLK"):
                setattr(part, name, torch.randn(B, G, context, K, device=device, dtype=part.k_BGLK.dtype))
            part.seen, part.room = context, None
    return state


@torch.no_grad()
def measure(model: LanguageModel, batch: int, context: int, seconds: float, compiled: bool, copy: float) -> dict[str, Any]:
    device, started = model.embedding.weight.device, time.perf_counter()
    state = state_at(model, batch, context)
    token = torch.randint(model.config.vocab_size, (batch,), device=device)
    expected = model(token[:, None], state=state, last_only=True).logits[:, -1].float()
    decoder = Decoder(model, state, context + 1024, compiled=compiled)
    del state
    error = float((decoder.step(token).float() - expected).norm() / expected.norm())
    times: list[float] = []
    while len(times) < 10 and (len(times) < 3 or time.perf_counter() - started < seconds):
        wait(device)
        begin = time.perf_counter()
        for _ in range(20):
            token = decoder.step(token).argmax(-1)
        wait(device)
        times.append((time.perf_counter() - begin) / 20)
    step = sorted(times)[len(times) // 2]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.embedding.weight.nbytes  # of it a row a token is read
    state_bytes = model.state_bytes(context, 1, model.head.weight.dtype)
    return {
        "tokens_per_s": batch / step,
        "ms_per_step": 1e3 * step,
        "share_of_weight_bandwidth_bound": weights / copy / step,
        "share_with_state": (weights + batch * state_bytes) / copy / step,
        "weight_bytes": weights,
        "state_bytes_per_sequence": state_bytes,
        "logits_error_relative": error,
        "seconds_in_all": time.perf_counter() - started,
    }


def main() -> None:
    options = {"out": "docs/results/decode.json", "seconds": "60", "only": "", "compiled": "false", "toy": "false"}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in options:
            sys.exit(f"error: Unknown argument {argument!r}; known are {', '.join(options)}.")
        options[key] = value
    toy, compiled = options["toy"] == "true", options["compiled"] == "true"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not toy:
        sys.exit("error: This measures a GPU; toy=true runs small models on a CPU.")
    copy, out = bandwidth(device), Path(options["out"])
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "compiled": compiled,
        "copy_bytes_per_s": copy,
        "items": {},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for size in ["toy"] if toy else ["400m", "1b"]:
        for family in ("paragru", "mamba2", "transformer"):
            if options["only"] not in f"{family}-{size}":
                continue
            with torch.device(device):
                model = cast(LanguageModel(config_of(family, size)), torch.bfloat16).eval()
            model.init_weights(0)
            for batch in (1, 4) if toy else (1, 64):
                for context in (32, 100) if toy else (1024, 131072):
                    key = f"{family}-{size} batch {batch} context {context}"
                    try:
                        row = measure(model, batch, context, float(options["seconds"]), compiled, copy)
                    except torch.OutOfMemoryError:
                        row = {"skipped": "out of memory", "state_bytes_per_sequence": model.state_bytes(context)}
                    report["items"][key] = row
                    temporary = out.with_name(out.name + ".tmp")
                    temporary.write_text(json.dumps(report, indent=2) + "\n")
                    os.replace(temporary, out)
                    shown = ", ".join(
                        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
                    )
                    print(f"{key}: {shown}", flush=True)
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
            del model


if __name__ == "__main__":
    main()
