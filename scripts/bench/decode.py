"""Decoding speed: tokens/s, the share of what reading the weights once a step allows, and state bytes per sequence.

    python -m scripts.bench.decode [out=docs/results/decode/decode.json] [seconds=240] [only=paragru-400m] [compiled=false] [toy=true]
    python -m scripts.bench.decode plot=docs/results/decode/decode.json      # draws decode.png beside it

Random weights in bf16 (the recurrences' own parameters in fp32), one step as a CUDA graph, greedy. A recurrent model reads `context` random
tokens in chunks (one sequence, its state then repeated for every row); an attention cache is filled with random numbers. Before timing, the
decoder's logits are compared with the model's own (where memory allows both). Beside it, transformers' generate on the exported folder, its steps timed after the prompt.
The bound is the time to read all weights but the embedding at the speed of a measured copy. compiled=true lets torch.compile fuse the step
instead of the project's kernels. The 1B models come first and transformers last. What does not fit in memory, or in `seconds`, is left out and
says so; the JSON is written after every item, and the same command (commit, versions, device) goes on with what is missing in it.
only: items whose name holds this. toy=true runs small models on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import overlapped
from models.config import ModelConfig
from models.contract import with_tensors
from models.decode import Decoder, cast
from models.lm import LanguageModel, LMState
from scripts.bench.timing import Results, copy_bandwidth, seconds
from training.config.arguments import program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# As configs/size and configs/model have them: width, layers, layers without an MLP, heads, Mamba-2 state.
SIZES = {"400m": (1024, 24, 48, 8, 64), "1b": (2048, 24, 48, 16, 128), "toy": (64, 2, 4, 4, 16)}
VOCABULARY = 50304
FAMILIES = ("paragru", "mamba2", "gated_deltanet", "gdn_hybrid", "transformer", "m2rnn")
STEP_KERNELS = {
    "mamba2": ("mamba2", "mamba2_step"),
    "gated_deltanet": ("delta", "delta_step"),
    "m2rnn": ("m2rnn", "m2rnn_step"),
}  # (file of the mixer, the op) by family
NO_TIME = "no time left"


def config_of(family: str, size: str) -> ModelConfig:
    width, layers, layers_bare, heads, d_state = SIZES[size]
    mixer: dict[str, Any] = {
        "paragru": {"type": "rnn", "cell": "paragru", "n_heads": 4},
        "mamba2": {"type": "mamba2", "d_state": d_state, "chunk": 64},
        "gated_deltanet": {"type": "delta", "n_heads": heads},
        "m2rnn": {"type": "m2rnn", "n_heads": width // 64},
        "gdn_hybrid": {"type": "attention", "n_heads": heads, "qk_norm": True, "qk_norm_centred": True, "output_gate": True},
        "transformer": {"type": "attention", "n_heads": heads},
    }[family]
    hybrid = family == "gdn_hybrid"
    bare = family == "mamba2"
    return ModelConfig(
        vocab_size=VOCABULARY if size != "toy" else 512,
        d_model=width,
        n_layers=layers_bare if bare else layers,
        pattern=["delta", "delta", "delta", family] if hybrid else [family],
        mixers={family: mixer, **({"delta": {"type": "delta", "n_heads": heads}} if hybrid else {})},
        centred_norms=hybrid,
        d_ff=0 if bare else -1,
        learnable_residual=family == "paragru",
    )


def random_model(config: ModelConfig, device: torch.device) -> LanguageModel:
    """All layers get the same random weights, drawn once: what they are does not matter to the time."""
    one = LanguageModel(dataclasses.replace(config, n_layers=len(config.pattern), vocab_size=8))
    one.init_weights(0)
    with torch.device("meta"):
        model = LanguageModel(config)
    model = model.to_empty(device=device)
    with torch.no_grad():
        model.embedding.weight.normal_(0, 0.02)
        model.head.weight.normal_(0, 0.02)
        model.norm.init_weights()
        for i, block in enumerate(model.blocks):
            block.load_state_dict(one.blocks[i % len(one.blocks)].state_dict())
    return cast(model, torch.bfloat16).eval()


@torch.no_grad()
def state_at(model: LanguageModel, context: int, state: Any = None, tokens_read: int = 0) -> Any:
    """The state of one sequence after `context` random tokens, of which `state` has read `tokens_read`; one with caches is drawn at
    random."""
    device = model.embedding.weight.device
    state = model.init_state(1) if state is None else state
    if any(block.mixer.grows() for block in model.blocks):
        return LMState([block.mixer.random_state(1, context, device) for block in model.visits()])
    chunk = 4096
    for first in range(tokens_read, context, chunk):
        ids = torch.randint(model.config.vocab_size, (1, min(chunk, context - first)), device=device)
        state = model(ids, state=state, last_only=True).state
    return state


def repeated(state: Any, batch: int) -> Any:
    """The state of one row for `batch` rows."""
    return LMState([with_tensors(part, lambda t: t.repeat_interleave(batch, 0)) for part in state.layers])


@torch.no_grad()
def measure(model: LanguageModel, one: Any, batch: int, context: int, compiled: bool, copy: float) -> dict[str, Any]:
    device, started = model.embedding.weight.device, time.perf_counter()
    state = repeated(one, batch) if batch > 1 else one
    token = torch.randint(model.config.vocab_size, (batch,), device=device)
    expected = None
    if 2.2 * batch * model.state_bytes(context) < memory(device):  # the model's own step may double a cache
        expected = model(token[:, None], state=state, last_only=True).logits[:, -1].float()
        empty_cache(device)
    decoder = Decoder(model, state, context + 1024, compiled=compiled)
    del state
    first = decoder.step(token).float()
    error = None if expected is None else float((first - expected).norm() / expected.norm())

    def twenty() -> None:
        nonlocal token
        for _ in range(20):
            token = decoder.step(token).argmax(-1)

    step = statistics.median(seconds(twenty, device) for _ in range(10)) / 20
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.embedding.weight.nbytes  # of it a row a token is read
    state_bytes = model.state_bytes(context, 1, model.head.weight.dtype)
    return {
        "tokens_per_s": batch / step,
        "ms_per_step": 1e3 * step,
        "share_of_weight_bandwidth_bound": weights / copy / step,
        "share_with_state": (weights + batch * state_bytes) / copy / step,
        "weight_bytes": weights,
        "state_bytes_per_sequence": state_bytes,
        "fused_kernels": decoder.fused,
        "logits_error_relative": error,
        "seconds_in_all": time.perf_counter() - started,
    }


@torch.no_grad()
def measure_transformers(model: LanguageModel, batch: int, context: int, new: int = 24) -> dict[str, Any]:
    """transformers' generate on the exported folder: the time of `new` more tokens after the prompt and one token."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from models.hub.export import write_folder

    device = model.embedding.weight.device
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "c"), Path(scratch, "hf")
        source.mkdir()
        out.mkdir()
        save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(model.config.to_dict()))
        architecture = write_folder(source, out, "bf16", 10**12, "apache-2.0").architecture
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, trust_remote_code=True).to(device).eval()
    ids = torch.randint(model.config.vocab_size, (batch, context), device=device)

    def run(tokens: int) -> float:
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "eos_token_id": None}
        return seconds(lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **options), device)

    run(2)
    first, whole = run(1), run(1 + new)
    step = (whole - first) / new
    return {"class": architecture, "tokens_per_s": batch / step, "ms_per_step": 1e3 * step, "ms_prompt": 1e3 * first}


def plot(path: Path) -> None:
    """Tokens/s of every item, at batch 1 and at the larger batch, drawn from the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    report = json.loads(path.read_text())
    items = {k: v for k, v in report["items"].items() if "tokens_per_s" in v}
    batches = sorted({key.split(" batch ")[1].split()[0] for key in items}, key=int)
    figure, axes = pyplot.subplots(1, len(batches), figsize=(7 * len(batches), 0.3 * len(items) / len(batches) + 2), squeeze=False)
    for axis, batch in zip(axes[0], batches):
        rows = {k.replace(f" batch {batch}", ""): v["tokens_per_s"] for k, v in items.items() if f" batch {batch} " in k}
        axis.barh(list(rows), list(rows.values()), color=["0.6" if "transformers" in k else "tab:blue" for k in rows])
        axis.invert_yaxis()
        axis.set(title=f"batch {batch}, {report['device']}", xlabel="tokens/s")
        axis.bar_label(axis.containers[0], fmt="{:,.0f}", padding=2)
        axis.set_xlim(0, 1.2 * max(rows.values()))
        axis.locator_params(axis="x", nbins=5)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=100)


# of runs whose items may stand side by side
SAME = ("commit", "uncommitted_changes", "torch", "triton", "transformers", "device", "compiled", "dependent_launch")


class Bench:
    """Measures item after item and keeps the file whole."""

    def __init__(self, options: dict[str, str]) -> None:
        self.started, self.seconds = time.perf_counter(), float(options["seconds"])
        self.compiled, self.out, self.only = options["compiled"] == "true", Path(options["out"]), options["only"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.toy = options["toy"] == "true"
        if self.device.type == "cpu" and not self.toy:
            raise UserError("This measures a GPU; toy=true runs small models on a CPU.")
        self.results = Results(self.out, self.device, compiled=self.compiled, dependent_launch=overlapped())
        self.report = self.results.values
        before = json.loads(self.out.read_text()) if self.out.exists() else {}
        if before and any(before.get(key) != self.report[key] for key in SAME):
            raise UserError(f"{self.out} was measured with another commit, version or device; give another out=FILE or remove it.")
        self.copy = before.get("copy_bytes_per_s") or 1e3 * copy_bandwidth(self.device)
        items = {key: row for key, row in before.get("items", {}).items() if row.get("skipped") != NO_TIME}
        self.report |= {"copy_bytes_per_s": self.copy, "items": items}

    def late(self) -> bool:
        return time.perf_counter() - self.started > self.seconds

    def still_to_do(self, keys: list[str]) -> bool:
        """Whether one of these items has to be measured now. When the time is over, the missing ones are recorded as not measured."""
        missing = [key for key in keys if self.only in key and key not in self.report["items"]]
        if missing and self.late():
            for key in missing:
                self.item(key, dict)
        return bool(missing) and not self.late()

    def item(self, key: str, work: Callable[[], dict[str, Any]]) -> None:
        if self.only not in key or self.report["items"].get(key, {"skipped": NO_TIME}).get("skipped") != NO_TIME:
            return
        if self.late():
            row: dict[str, Any] = {"skipped": NO_TIME}
        else:
            try:
                row = work()
            except torch.OutOfMemoryError:
                row = {"skipped": "out of memory"}
        self.results.item("items", key, row)
        empty_cache(self.device)

    def run(self) -> None:
        sizes = ["toy"] if self.toy else ["1b", "400m"]
        for size in sizes:
            for family in FAMILIES:
                self.steps(family, size)
        for size in sizes:
            for family in FAMILIES:
                self.beside(family, size)

    def steps(self, family: str, size: str) -> None:
        """The model's own decoding, at every context and batch."""
        contexts, batches = ((32, 100), (1, 12)) if self.toy else ((1024, 131072), (1, 64))
        name = f"{family}-{size}"
        plain = f"{name} batch {batches[1]} context {contexts[0]}, step in plain torch"
        keys = {(c, b): f"{name} batch {b} context {c}" for c in contexts for b in batches}
        if not self.still_to_do([*keys.values(), *([plain] if family in STEP_KERNELS else [])]):
            return
        model = random_model(config_of(family, size), self.device)
        one, tokens_read = None, 0
        for context in contexts:
            if not self.still_to_do([keys[context, b] for b in batches]) and not (
                family in STEP_KERNELS and context == contexts[0] and self.still_to_do([plain])
            ):
                continue
            one, tokens_read = state_at(model, context, one, tokens_read), context
            for batch in batches:
                copies = 1 if batch == 1 else 2  # the decoder's, and before it one of a row for all
                if 1.1 * copies * batch * model.state_bytes(context + 1024) > memory(self.device):
                    row = {"skipped": "its cache does not fit in memory", "state_bytes_per_sequence": model.state_bytes(context)}
                    self.item(keys[context, batch], row.copy)
                else:
                    self.item(keys[context, batch], functools.partial(measure, model, one, batch, context, self.compiled, self.copy))
            if family in STEP_KERNELS and context == contexts[0]:
                self.item(
                    plain, functools.partial(in_plain_torch, family, measure, model, one, batches[1], context, self.compiled, self.copy)
                )

    def beside(self, family: str, size: str) -> None:
        """transformers on the exported folder."""
        new, name = 4 if self.toy else 24, f"{family}-{size} by transformers"
        cases = {
            f"{name} batch {b} context {c}": (b, c)
            for b, c in (((1, 32),) if self.toy else ((1, 1024), (64, 64)))
            if b == 1 or size != "1b"
        }
        if self.still_to_do(list(cases)):
            model = random_model(config_of(family, size), self.device)
            for key, (batch, context) in cases.items():
                self.item(key, functools.partial(measure_transformers, model, batch, context, new))


def in_plain_torch(family: str, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`work` without the kernel of this family's step, for comparison."""
    mixer, op = STEP_KERNELS[family]
    module, reference = importlib.import_module(f"models.mixers.{mixer}"), importlib.import_module(f"kernels.{op}.reference")
    kernel = getattr(module, op)
    setattr(module, op, getattr(reference, op))
    try:
        return work(*arguments)
    finally:
        setattr(module, op, kernel)


def empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory(device: torch.device) -> float:
    """Bytes that are free."""
    empty_cache(device)
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else 8e9


def main() -> None:
    options = {"out": "docs/results/decode/decode.json", "seconds": "240", "only": "", "compiled": "false", "toy": "false", "plot": ""}
    for argument in sys.argv[1:]:
        key, _, value = argument.removeprefix("--").partition("=")
        if key not in options:
            raise UserError(f"Unknown argument {argument!r}; known are {', '.join(options)}.")
        options[key] = value
    try:
        float(options["seconds"])
    except ValueError as error:
        raise UserError(f"seconds must be a number, not {options['seconds']!r}.") from error
    if options["plot"]:
        plot(Path(options["plot"]))
    else:
        Bench(options).run()


if __name__ == "__main__":
    sys.exit(program(__doc__, lambda words: main()))
