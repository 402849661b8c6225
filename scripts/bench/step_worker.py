"""One row of scripts/bench/step.py, in a process of its own: a model's training step, timed and profiled.

    python scripts/bench/step_worker.py '{"name": "transformer-400m", "rows": 16, ...}'        # with the code of any commit before it in PYTHONPATH

Nothing of ours is imported but what the commit's own code has: its models, and its training where it has that.
"""

from __future__ import annotations

import inspect
import json
import math
import statistics
import sys
import time
from typing import Any

import torch

VOCABULARY, T = 50432, 2048
# width, layers, layers without an MLP, attention heads, Mamba-2 state, rows of a step: configs/size
SIZES = {"400m": (1024, 24, 48, 8, 64, 16), "1b": (2048, 24, 48, 16, 128, 8), "toy": (64, 2, 4, 4, 16, 2)}
FAMILIES = ("transformer", "paragru", "mamba2", "hybrid", "gated_deltanet", "gdn_hybrid", "dense_lstm", "slstm")
PARTS = (  # of a profile: the first that a kernel's name holds; other products of Muon count among products
    ("optimizer", ("adam", "multi_tensor", "lpnorm", "foreach", "total_squares", "muon_", "symmetric_product")),
    ("attention", ("flash", "fmha", "attention", "sdpa", "cudnn")),
    ("casts to 8 bits", ("float8_",)),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitKreduce")),
    ("recurrence", tuple("shoot mend border parallel_rnn walk outputs carry key_side query_side add_shares".split())),
    ("recurrence", tuple("key_gradients query_gradients prepare recover inputs project local pair_gradients correct certify".split())),
    ("recurrence", ("finish", "slopes", "adjoint")),
    ("norm, convolution, gates", ("forward", "backward", "turn", "add_norm", "conv", "norm")),
    ("loss", ("losses", "logits_gradient")),
    ("recurrence", ("gradient",)),
    ("copies and adds", ("elementwise", "copy", "cast", "cat", "fill", "reduce", "memcpy", "memset")),
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


def ours(name: str, rows: int, length: int, packed: bool, graph: bool, device: torch.device) -> tuple[Any, Any, Any, float]:
    """(model, a function that makes the gradients and returns the loss, the same as written, model FLOPs of a token in training)."""
    from models.lm import LanguageModel

    model = LanguageModel(settings_of(name))
    model.init_weights(0)
    model.to(device)
    ids, segments = batch(rows, length, model.config.vocab_size, packed, device)

    labels = ids.roll(-1, 1)
    graphed = None

    def written() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=labels, segment_ids=segments).loss_sum / ids.numel()
        loss.backward()
        return loss.detach()

    if name.partition("-")[0] in ("dense_lstm", "slstm"):  # its plans are those of some steps of training, not the first ones
        from scripts.bench.dense_plans import settled_model

        settled_model(model, written, device)
        model.zero_grad()
    if graph and device.type == "cuda":
        try:
            from training.graph import GraphedPass
        except ImportError:  # a commit from before it
            graph = False
    if graph and device.type == "cuda":
        from data.loader import Batch

        graphed = GraphedPass(model, device, autocast=True)
        host = [None if t is None else t.cpu().pin_memory() for t in (ids, labels, segments)]
        loaded = Batch(host[0], host[1], host[2], [0] * rows)
        model.recorded = graphed  # for what an optimizer records in the same memory

    def gradients() -> torch.Tensor:
        replayed = graphed.run(loaded, 1 / ids.numel()) if graphed is not None else None
        if graphed is not None and graphed.why_not:
            raise RuntimeError(graphed.why_not)
        return replayed / ids.numel() if replayed is not None else written()

    return model, gradients, written, 3.0 * model.flops_per_token(length)


def causal_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for attention, without a mask: torch's kernels leave out what is ahead of a token, where a mask has it computed."""
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


def peer(name: str, rows: int, length: int, device: torch.device, causal: bool) -> tuple[Any, Any, Any, float]:
    """transformers' Llama of the Transformer's shape, compiled. causal: with attention that takes no mask; its own makes one when it is compiled
    (releases to 5.17 at least)."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("without_mask", causal_attention)

    shape = settings_of(name)
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.mlp_width, num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.mixers["attention"]["n_heads"], num_key_value_heads=shape.mixers["attention"]["n_heads"],
        tie_word_embeddings=False, use_cache=False, max_position_embeddings=length,
        attn_implementation="without_mask" if causal else "sdpa",
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

    return model, gradients, gradients, flops


def part_of(kernel: str) -> str:
    """The part of a step that a kernel's name belongs to."""
    return next((part for part, words in PARTS if any(word.lower() in kernel.lower() for word in words)), "other")


def parts_of(step: Any) -> dict[str, Any]:
    """Milliseconds of one step's kernels by part, the largest of them, launches, the share of the step's span without a kernel, and between which
    kernels that is."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
        torch.cuda.synchronize()
    # is_kernel of scripts/bench/spans.py, written again: with the code of an older commit in PYTHONPATH that file may be another, or not there
    marks = ("ProfilerStep", "Optimizer.", "## ")  # around kernels; whose own names may hold a # too, as lambdas have it
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profile.events()
        if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False) and not e.name.startswith(marks)
    )
    total: dict[str, tuple[float, int]] = {}
    parts: dict[str, float] = {}
    gaps: dict[str, tuple[float, int]] = {}
    busy, end, before = 0.0, 0.0, ""
    for first, last, name in spans:
        if before and first > end:
            pair = f"{before[:40]} > {name[:40]}"
            gaps[pair] = (gaps.get(pair, (0.0, 0))[0] + (first - end) / 1e3, gaps.get(pair, (0.0, 0))[1] + 1)
        before = name if last > end else before
        busy, end = busy + max(0.0, last - max(first, end)), max(end, last)
        total[name] = (total.get(name, (0.0, 0))[0] + (last - first) / 1e3, total.get(name, (0.0, 0))[1] + 1)
        part = part_of(name)
        parts[part] = parts.get(part, 0.0) + (last - first) / 1e3
    span = (spans[-1][1] - spans[0][0]) if spans else 1.0
    largest = sorted(total.items(), key=lambda item: -item[1][0])[:25]
    return {
        "parts_ms": {k: round(v, 2) for k, v in sorted(parts.items(), key=lambda item: -item[1])},
        "kernels_ms": round(sum(ms for ms, _ in total.values()), 2), "span_ms": round(span / 1e3, 2), "idle": round(1 - busy / span, 4),
        "launches": len(spans), "largest": [{"name": n[:100], "ms": round(ms, 3), "calls": c} for n, (ms, c) in largest],
        "gaps": [{"between": pair, "ms": round(ms, 3), "times": n} for pair, (ms, n) in sorted(gaps.items(), key=lambda item: -item[1][0])[:12]],
    }  # fmt: skip


def _adamw_of(kind: str) -> Any:
    """The AdamW of a run, or torch's own for a peer and where the code has none."""
    if kind == "peer":
        return torch.optim.AdamW
    try:
        from training.optim.adamw import SkippableAdamW
    except ImportError:  # a commit from before it
        return torch.optim.AdamW
    return SkippableAdamW


def update_of(model: Any, kind: str, symmetric: bool) -> Any:
    """Two functions, of which the first, given the loss, has gradients clipped and the optimizer look for its tensors while the device is at the pass,
    and the second takes the optimizer's step; and the optimizer. As training.engine does, where the code has it."""
    parameters = list(model.parameters())
    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if kind.startswith("muon"):
        from kernels import symmetric as products
        from training.optim.muon import MuonWithAdamW

        if not symmetric:
            products.use_triton = lambda x_kmn: False
        steps: dict[str, Any] = {"steps": int(kind[4:])} if kind[4:] else {}
        optimizer: Any = MuonWithAdamW(model, muon_lr=1e-4, eps=1e-8, **steps, **settings)
        recorded = getattr(model, "recorded", None)
        if recorded is not None and hasattr(optimizer, "replay"):
            from training.graph import GraphedUpdate

            optimizer.replay = GraphedUpdate(recorded)
    else:
        optimizer = _adamw_of(kind)(parameters, fused=True, **settings)
    try:
        from training.optim.clip import norm_ahead
    except ImportError:  # a commit from before it
        norm_ahead = None  # type: ignore[assignment]
    of_loss = norm_ahead is not None and "loss" in inspect.signature(norm_ahead).parameters

    def ahead(loss: torch.Tensor) -> None:
        if kind == "peer" or norm_ahead is None or norm_ahead(parameters, optimizer, 1.0, *[loss] * of_loss) is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        if hasattr(optimizer, "prepare"):
            optimizer.prepare()

    return ahead, optimizer.step, optimizer


def update_ms(ahead: Any, update: Any, loss: torch.Tensor) -> float:
    """Median milliseconds of the update alone, on the device."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    for start, end in events:
        start.record()
        ahead(loss)
        update()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in events), 3)


def learnt(losses: list[float]) -> list[float]:
    """The first and the last loss of steps on the same tokens. Raises RuntimeError where they do not fall: products of zeros, or of what is no number,
    take a GPU less power and so less time, and a time of those is none."""
    if not all(math.isfinite(loss) for loss in losses) or losses[-1] >= min(losses[:3]):
        raise RuntimeError(
            f"The losses do not fall ({', '.join(f'{loss:.4f}' for loss in losses)}): a pass or an update is wrong, and its time is none."
        )
    return [round(losses[0], 4), round(losses[-1], 4)]


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
    residual: str,
    ceilings: bool,
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
    model, gradients, written, flops = (
        peer(name, rows, length, device, kind == "causal") if is_peer else ours(name, rows, length, packed, graph, device)
    )
    if residual == "bf16" and not is_peer:
        model.residual_dtype = torch.bfloat16
    ahead, update, optimizer = update_of(model, "peer" if is_peer else kind, symmetric)
    decides = hasattr(type(optimizer), "leaves_out")  # the update leaves itself out where loss or norm are not finite
    if decides:
        from training.passes import sent_to_host

    def step() -> float:
        """As training.engine takes it: the norm is queued behind the pass; then the update, if it decides for itself, else when the loss is read; and
        the next pass behind that."""
        optimizer.zero_grad(set_to_none=True)
        queued = gradients()
        read = sent_to_host(queued) if decides else lambda: float(queued)
        ahead(queued)
        if decides and optimizer.leaves_out:
            update()
            return read()
        loss = read()
        update()
        return loss

    losses = [step()]
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - begin
    losses += [step() for _ in range(5)]
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - start)
    ms = 1e3 * statistics.median(times)
    row = {
        "rows": rows, "length": length, "step_ms": round(ms, 2), "tokens_per_s": round(rows * length / ms * 1e3), "first_step_s": round(first, 1), "losses": losses, "losses_from_to": learnt(losses),
        "flops": flops * rows * length, "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row |= parts_of(step)
        row["update_ms"] = update_ms(ahead, update, torch.ones((), device=device))
        if ceilings:
            from scripts.bench.ceilings import table

            def plain() -> None:
                optimizer.zero_grad(set_to_none=True)
                ahead(written())
                update()

            row["ceilings"] = table(plain, row["parts_ms"], part_of, device)
    return row


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__)
        sys.exit(0 if sys.argv[1:] else 2)
    print(json.dumps(measure(**json.loads(sys.argv[1]))), flush=True)
