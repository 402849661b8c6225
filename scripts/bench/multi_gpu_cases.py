"""What scripts/bench/multi_gpu.py has its workers measure: the cases of whole models under ZeRO, and of sequences cut over GPUs."""

from __future__ import annotations

from typing import Any

MODELS = ("transformer", "paragru", "mamba2", "hybrid")
LAYERS: dict[str, dict[str, Any]] = {
    "paragru": {"type": "rnn", "cell": "paragru"},
    "mamba2": {"type": "mamba2", "d_state": 64, "chunk": 64},
    "attention": {"type": "attention", "n_heads": 8},
    "paralstm": {"type": "rnn", "cell": "paralstm"},
    "window 4096": {"type": "attention", "n_heads": 8, "window": 4096},
}
MICRO = {"400m": 16, "1b": 8, "35m": 8, "tiny": 2}  # rows of 2,048 tokens a GPU, what 80 GB hold of every model

Task = tuple[int, dict[str, Any]]


def sequence(gpus: int, toy: bool) -> list[list[Task]]:
    """The cases at the shorter length, those at the longer, what is quadratic last, and those of other layers."""
    N, D = gpus, 32 if toy else 1024
    short, long = (128 * N, 256 * N) if toy else (131072, 1048576)
    size = "tiny" if toy else "400m"

    def layer(name: str, T: int) -> Task:
        mapping = LAYERS[name]
        if toy:
            mapping = mapping | {"mamba2": {"head_dim": 16, "d_state": 8}, "window 4096": {"window": 16}}.get(name, {})
        alone = T == short or name not in ("attention", "mamba2")
        check = (64 if toy else 4096) * N if T == short else 0
        return N, {
            "part": "sequence",
            "id": f"{name} {T}",
            "kind": "layer",
            "mixer": mapping,
            "D": D,
            "T": T,
            "check": check,
            "alone": alone,
        }

    def whole(model: str, T: int) -> Task:
        overrides = [*plain(model, size, 1, T, 1, 1), "train.activation_checkpointing=full"]
        named = {"part": "sequence", "id": f"{model} {size} {T}", "kind": "train", "sequence": N, "steps": 3}
        return N, {**named, "model": model, "overrides": overrides}

    first = [layer(name, short) for name in ("paragru", "mamba2", "attention")]
    first += [whole(model, short) for model in ("paragru", "mamba2", "transformer")]
    then = [layer("paragru", long), layer("mamba2", long), whole("paragru", long), whole("mamba2", long), layer("attention", long)]
    rest = [layer(name, T) for T in (short, long) for name in ("paralstm", "window 4096")]
    return [first, then, rest]


def plain(model: str, size: str, stage: int, T: int, micro: int, rows: int) -> list[str]:
    return [
        *(f"model={model}", f"size={size}", f"deepspeed=zero{stage}", "train.precision=bf16", f"train.seq_len={T}"),
        *(f"train.micro_batch={micro}", f"train.global_batch={rows}"),
    ]


def zero(gpus: int, toy: bool, sizes: list[str]) -> list[list[Task]]:
    """ZeRO-1 of the smaller size, each model on one GPU and on all; equal losses, its ZeRO-3 and ZeRO-1 of the larger; then the rest."""
    N, T = gpus, 64 if toy else 2048
    sizes = ["tiny"] if toy else sizes

    def case(model: str, size: str, stage: int, ranks: int) -> Task:
        named = {
            "part": "zero",
            "id": f"{model} {size} zero{stage}",
            "kind": "train",
            "steps": 8,
            "model": model,
            "size": size,
            "stage": stage,
        }
        return ranks, {**named, "overrides": plain(model, size, stage, T, MICRO[size], MICRO[size] * ranks)}

    def equal(ranks: int) -> Task:
        small, rows = "tiny" if toy else "35m", 8
        named = {"part": "zero", "id": "equal losses", "kind": "train", "init": "own", "steps": 20, "lr": 1e-3, "vocabulary": 4096}
        return ranks, {**named, "overrides": plain("hybrid", small, 1, 64 if toy else 1024, rows // ranks, rows)}

    def scaled(size: str) -> list[Task]:
        return [case(model, size, 1, ranks) for model in MODELS for ranks in (1, N)]

    def staged(stage: int, size: str) -> list[Task]:
        return [case(model, size, stage, N) for model in MODELS]

    larger = sizes[1:]
    then = [equal(1), equal(N), *staged(3, sizes[0]), *(task for size in larger for task in scaled(size))]
    rest = [*staged(2, sizes[0]), *(task for size in larger for stage in (3, 2) for task in staged(stage, size))]
    return [scaled(sizes[0]), then, rest]
