"""A whole training step on one GPU: tokens/s, share of the peak, memory, and where the time goes, beside transformers with torch.compile.

    python -m scripts.bench.step out=docs/results/step/h100.json                         # all rows of models=, some minutes
    python -m scripts.bench.step out=FILE models=transformer-400m peers=false packed=true
    python -m scripts.bench.step out=FILE against=v0.1                                    # the same rows of another commit beside them
    python -m scripts.bench.step out=FILE models=transformer-400m optimizer=adamw,muon    # a row for each; symmetric=false: products whole
    python -m scripts.bench.step out=FILE models=transformer-400m,gdn_hybrid-400m length=8192 peers=false

A step is forward, backward, clipping and the optimizer, with fp32 weights and products in bf16 (autocast), as `train.py` runs it on one GPU but for
DeepSpeed and the loader. Every row runs in a process of its own. tokens/s are medians; `idle` is the share of the profiled step in which no kernel
runs; packed rows hold documents of 200 to 4,000 tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, T = 50432, 2048
# width, layers, layers without an MLP, attention heads, Mamba-2 state, rows of a step: configs/size
SIZES = {"400m": (1024, 24, 48, 8, 64, 16), "1b": (2048, 24, 48, 16, 128, 8), "toy": (64, 2, 4, 4, 16, 2)}
FAMILIES = ("transformer", "paragru", "mamba2", "hybrid", "gated_deltanet", "gdn_hybrid", "dense_lstm", "slstm")
DEFAULTS: dict[str, Any] = {
    "out": "",  # JSON to write
    "models": "transformer-400m,paragru-400m,hybrid-400m,mamba2-400m,transformer-1b,paragru-1b",  # family-size
    "rows": 0,  # sequences of a step; 0: 16 at 400m, 8 at 1b, so many times fewer as they are longer than 2,048 tokens
    "length": T,  # tokens of a sequence
    "steps": 20,  # timed steps of a row
    "packed": False,  # documents end inside rows too
    "graph": True,  # forward and backward as one CUDA graph, as train.cuda_graph=auto has them
    "attention": "auto",  # of packed documents, as train.packed_attention: auto, own or torch
    "fp8": False,  # large products of our rows in 8-bit floats, as train.fp8
    "optimizer": "adamw",  # of our rows: adamw, muon, or both
    "symmetric": True,  # Muon's symmetric products by the kernel that computes half of them
    "peers": True,  # transformers' Llama under torch.compile beside the Transformer
    "against": "",  # another commit, whose rows are measured in turn
}
SHOWN = "tokens_per_s mfu step_ms update_ms kernels_ms idle peak_gib first_step_s parts_ms".split()  # of a row, on the screen
PARTS = (  # of a profile: the first that a kernel's name holds; other products of Muon count among products
    ("optimizer", ("adam", "multi_tensor", "lpnorm", "foreach", "total_squares", "muon_", "symmetric_product")),
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn_generated")),
    ("casts to 8 bits", ("float8_",)),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitKreduce")),
    ("recurrence", tuple("shoot mend border parallel_rnn walk outputs key_gradients query_gradients prepare recover inputs".split())),
    ("recurrence", ("project", "local", "pair_gradients", "correct", "certify", "finish")),
    ("norm, convolution, gates", ("forward", "backward", "turn", "add_norm", "conv", "norm")),
    ("loss", ("losses", "gradient")),
    ("copies and adds", ("elementwise", "copy", "cat", "fill", "reduce", "memcpy", "memset")),
)


def settings_of(name: str) -> Any:
    """The ModelConfig of `family-size`, as configs/model and configs/size make it."""
    from models.config import ModelConfig

    family, _, size = name.partition("-")
    width, layers, bare_layers, heads, d_state, _ = SIZES[size]
    mixers: dict[str, dict[str, Any]] = {
        "paragru": {"type": "rnn", "cell": "paragru", "n_heads": 4},
        "dense_lstm": {"type": "rnn", "cell": "dense_lstm", "n_heads": 4},  # heads of 64, the default
        "slstm": {"type": "rnn", "cell": "slstm", "n_heads": 4},
        "mamba2": {"type": "mamba2", "d_state": d_state},
        "attention": {"type": "attention", "n_heads": heads},
        "gated_deltanet": {"type": "delta", "n_heads": heads},
    }
    before_attention = {"hybrid": ["paragru", "mamba2", "paragru"], "gdn_hybrid": ["gated_deltanet"] * 3, "transformer": []}
    pattern, bare = [*before_attention[family], "attention"] if family in before_attention else [family], family == "mamba2"
    if family == "gdn_hybrid":
        mixers["attention"] |= dict.fromkeys(("qk_norm", "output_gate", "qk_norm_centred"), True)
    return ModelConfig(
        vocab_size=VOCABULARY if size != "toy" else 512,
        d_model=width,
        n_layers=bare_layers if bare else layers,
        pattern=pattern,
        mixers={kind: mixers[kind] for kind in pattern},
        d_ff=0 if bare else -1,
        learnable_residual=family in ("paragru", "dense_lstm", "slstm"),
        centred_norms=family == "gdn_hybrid",
    )


def batch(rows: int, length: int, vocabulary: int, packed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(ids (rows, length), the document of each token or None), from a seed."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (rows, length), generator=draws)
    if not packed:
        return ids.to(device), None
    starts = torch.zeros(rows * length, dtype=torch.int32)
    at = 0
    while at < rows * length:
        starts[at] = 1
        at += int(torch.randint(200, 4001, (), generator=draws))
    starts = starts.view(rows, length)
    starts[:, 0] = 0
    return ids.to(device), starts.cumsum(1).int().to(device)


def ours(name: str, rows: int, length: int, packed: bool, graph: bool, device: torch.device) -> tuple[Any, Any, float]:
    """(model, a function that makes the gradients and returns the loss, model FLOPs of a token in training)."""
    from models.lm import LanguageModel
    from scripts.bench.dense_plans import settled_model

    model = LanguageModel(settings_of(name))
    model.init_weights(0)
    model.to(device)
    ids, segments = batch(rows, length, model.config.vocab_size, packed, device)

    labels = ids.roll(-1, 1)
    graphed: Any = None

    def eager() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=labels, segment_ids=segments).loss_sum / ids.numel()
        loss.backward()
        return loss.detach()

    settled_model(model, eager, device)  # its plans are those of some steps of training, not the first ones
    model.zero_grad()
    if graph and device.type == "cuda":
        from data.loader import Batch
        from training.graph import GraphedPass

        graphed = GraphedPass(model, device, autocast=True)
        host = [None if t is None else t.cpu().pin_memory() for t in (ids, labels, segments)]
        loaded = Batch(host[0], host[1], host[2], [0] * rows)

    def gradients() -> torch.Tensor:
        replayed = graphed.run(loaded, 1 / ids.numel()) if graphed is not None else None
        if graphed is not None and graphed.why_not:
            raise RuntimeError(graphed.why_not)
        if replayed is not None:
            return replayed / ids.numel()
        return eager()

    return model, gradients, 3.0 * model.flops_per_token(length)


def peer(name: str, rows: int, length: int, device: torch.device) -> tuple[Any, Any, float]:
    """transformers' Llama of the Transformer's shape, compiled."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings_of(name)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.mlp_width, num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.mixers["attention"]["n_heads"], num_key_value_heads=shape.mixers["attention"]["n_heads"],
        tie_word_embeddings=False, use_cache=False, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    compiled = torch.compile(model)
    ids, _ = batch(rows, length, shape.vocab_size, False, device)
    from models.lm import LanguageModel

    with torch.device("meta"):
        flops = 3.0 * LanguageModel(shape).flops_per_token(length)

    def gradients() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    return model, gradients, flops


def parts_of(step: Any) -> dict[str, Any]:
    """Milliseconds of one step's kernels by part, the largest of them, launches, and the share of the step's span without a kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in profile.events() if e.device_type.name == "CUDA")
    total: dict[str, tuple[float, int]] = {}
    parts: dict[str, float] = {}
    busy, end = 0.0, 0.0
    for first, last, name in spans:
        busy, end = busy + max(0.0, last - max(first, end)), max(end, last)
        total[name] = (total.get(name, (0.0, 0))[0] + (last - first) / 1e3, total.get(name, (0.0, 0))[1] + 1)
        part = next((p for p, words in PARTS if any(w.lower() in name.lower() for w in words)), "other")
        parts[part] = parts.get(part, 0.0) + (last - first) / 1e3
    span = (spans[-1][1] - spans[0][0]) if spans else 1.0
    largest = sorted(total.items(), key=lambda item: -item[1][0])[:25]
    return {
        "parts_ms": {k: round(v, 2) for k, v in sorted(parts.items(), key=lambda item: -item[1])},
        "kernels_ms": round(sum(ms for ms, _ in total.values()), 2), "span_ms": round(span / 1e3, 2), "idle": round(1 - busy / span, 4),
        "launches": len(spans), "largest": [{"name": n[:100], "ms": round(ms, 3), "calls": c} for n, (ms, c) in largest],
    }  # fmt: skip


def update_of(model: Any, kind: str, symmetric: bool) -> Any:
    """A function that clips the gradients and takes the optimizer's step, and the optimizer. As training.engine does, where the code has it."""
    parameters = list(model.parameters())
    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if kind == "muon":
        from kernels import symmetric as products
        from training.optim.muon import MuonWithAdamW

        if not symmetric:
            products.use_triton = lambda x_kmn: False
        optimizer: Any = MuonWithAdamW(model, muon_lr=1e-4, eps=1e-8, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from kernels.tensor_lists import total_norm, use_triton
    except ImportError:  # a commit from before it
        total_norm, use_triton = None, lambda tensors: False  # type: ignore[assignment]

    def update() -> None:
        gradients = [p.grad for p in parameters]
        if kind != "peer" and use_triton(gradients):
            optimizer.grad_scale = (total_norm(gradients) + 1e-6).clamp(min=1.0)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        optimizer.step()

    return update, optimizer


def update_ms(update: Any) -> float:
    """Median milliseconds of the update alone, on the device."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    for start, end in events:
        start.record()
        update()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in events), 3)


def measure(
    name: str,
    rows: int,
    length: int,
    steps: int,
    packed: bool,
    graph: bool,
    is_peer: bool,
    kind: str,
    symmetric: bool,
    attention: str,
    fp8: bool,
) -> dict[str, Any]:
    """A row: what `name` does with `rows` sequences of `length` tokens a step."""
    from models import attend

    attend.own_kernels = attention
    if fp8:
        from kernels.linear import float8

        float8.wanted = not is_peer
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    begin = time.perf_counter()
    model, gradients, flops = peer(name, rows, length, device) if is_peer else ours(name, rows, length, packed, graph, device)
    update, optimizer = update_of(model, "peer" if is_peer else kind, symmetric)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = gradients()
        update()
        return loss

    losses = [float(step())]
    first = time.perf_counter() - begin
    losses += [float(step()) for _ in range(5)]
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(float(step()))  # waits for the device
        times.append(time.perf_counter() - start)
    ms = 1e3 * statistics.median(times)
    row = {
        "rows": rows, "length": length, "step_ms": round(ms, 2), "tokens_per_s": round(rows * length / ms * 1e3), "first_step_s": round(first, 1), "losses": losses,
        "flops": flops * rows * length, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row |= parts_of(step)
        row["update_ms"] = update_ms(update)
    return row


def run_row(tree: Path, name: str, rows: int, values: dict[str, Any], is_peer: bool, peak: float | None, kind: str) -> dict[str, Any]:
    """`measure` in a process of its own, of the code under `tree`."""
    packed, graph = values["packed"] and not is_peer, values["graph"] and tree == ROOT
    words = json.dumps(  # for this file, with the code of `tree`
        [
            name,
            rows,
            values["length"],
            values["steps"],
            packed,
            graph,
            is_peer,
            kind,
            values["symmetric"],
            values["attention"],
            values["fp8"] and tree == ROOT,
        ]
    )
    environment_ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH", "")])])}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", words]
    done = subprocess.run(command, cwd=tree, env=environment_, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr or done.stdout).strip()[-600:]}
    row = json.loads(lines[-1])
    if peak:
        row["mfu"] = round(row["flops"] / row["step_ms"] * 1e3 / peak, 4)
    return row


def unpacked(revision: str, folder: Path) -> Path:
    """The tree of another commit."""
    from training.errors import UserError

    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise UserError(f"against={revision} is no commit of this repository: {archive.stderr.decode().strip()[:200]}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def run(words: list[str]) -> None:
    from data.files import write_json
    from training.config.arguments import parse_arguments
    from training.cost.flops import peak_flops
    from training.errors import UserError
    from training.watch.metrics import environment

    values = parse_arguments(words, DEFAULTS)
    if not values["out"]:
        raise UserError("Name the JSON file to write: out=FILE.")
    names = [name for name in values["models"].split(",") if name]
    for name in names:
        if name.partition("-")[0] not in FAMILIES or name.partition("-")[2] not in SIZES:
            raise UserError(
                f"There is no model {name!r}; write family-size with one of {', '.join(FAMILIES)} and one of {', '.join(SIZES)}."
            )
    if values["length"] < 2:
        raise UserError(f"length={values['length']} must be at least 2.")
    if values["attention"] not in ("auto", "own", "torch"):
        raise UserError(f"attention={values['attention']} is none of auto, own and torch.")
    kinds = [kind for kind in values["optimizer"].split(",") if kind]
    if not kinds or set(kinds) - {"adamw", "muon"}:
        raise UserError(f"optimizer={values['optimizer']} is neither adamw nor muon nor both, optimizer=adamw,muon.")
    with tempfile.TemporaryDirectory() as folder:
        trees = {"ours": ROOT}
        if values["against"]:
            given = Path(values["against"])
            trees["against"] = given.resolve() if (given / "train.py").is_file() else unpacked(values["against"], Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peak = peak_flops(torch.cuda.get_device_name(), "bf16") if device.type == "cuda" else None
        result: dict[str, Any] = {**environment(device), "settings": values, "rows": {}}
        for name in names:
            rows = values["rows"] or max(1, SIZES[name.partition("-")[2]][5] * T // values["length"])
            cells = [
                (label if kind == "adamw" else f"{label}, {kind}", tree, False, kind)
                for kind in kinds
                for label, tree in trees.items()
                if kind == "adamw" or label == "ours"
            ]
            if values["peers"] and name.startswith("transformer"):
                cells.append(("transformers compiled", ROOT, True, "adamw"))
            for label, tree, is_peer, kind in cells:
                row = run_row(tree, name, rows, values, is_peer, peak, kind)
                result["rows"].setdefault(name, {})[label] = row
                write_json(Path(values["out"]), result)
                shown = {k: row.get(k) for k in SHOWN}
                print(f"{name} x {rows}, {label}: {json.dumps(shown) if 'error' not in row else row['error']}", flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:  # with the code of any commit, so nothing of ours is imported but the model
        print(json.dumps(measure(*json.loads(sys.argv[2]))), flush=True)
        return 0
    from training.config.arguments import program

    return program(__doc__, run, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
