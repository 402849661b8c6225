"""The plots of a report, each drawn from results as they lie in the JSON; None where matplotlib is not installed."""

from __future__ import annotations

import io
import math
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot without a display, or None."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        return plt
    except ImportError:
        return None


def png(plt: Any, figure: Any, dpi: int = 110, bbox_inches: str | None = "tight") -> bytes:
    """The figure as a PNG file; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches=bbox_inches)
    plt.close(figure)
    return buffer.getvalue()


def line(i: int) -> dict[str, str]:
    """Colour and dashes of the i-th line of a plot; thirty can be told apart."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}


def mean(values: list[float]) -> float | None:
    """The mean, None of nothing."""
    return sum(values) / len(values) if values else None


def curves_figure(plt: Any, curves: list[tuple[str, list[dict[str, Any]], int | None]], title: str) -> bytes | None:
    """Loss by position on a log axis with intervals; a dotted line at each training length. curves: (label, buckets, T)."""
    if plt is None or not curves:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for i, (label, buckets, T) in enumerate(curves):
        color = f"C{i % 10}"
        x = [max(1, (b["from"] * b["to"]) ** 0.5) for b in buckets]
        axes.plot(x, [b["nats_per_token"] for b in buckets], label=label, marker=".", markersize=4, **line(i))
        if all(b.get("low") is not None for b in buckets):
            axes.fill_between(x, [b["low"] for b in buckets], [b["high"] for b in buckets], alpha=0.15, color=color, linewidth=0)
        if T:
            axes.axvline(T, color=color, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="position in the sequence (dotted: training length)", ylabel="nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return png(plt, figure)


def rise_figure(plt: Any, curves: list[tuple[str, list[dict[str, Any]], dict[str, Any]]], title: str) -> bytes | None:
    """Loss beyond the training length T above that of the same tokens in windows of T, over position / T. curves: (label, buckets, collapse)."""
    curves = [c for c in curves if "delta" in c[2]]
    if plt is None or not curves:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for i, (label, buckets, judged) in enumerate(curves):
        T = judged["train_length"]
        x = [(b["from"] * b["to"]) ** 0.5 / T for b in buckets if b["from"] >= T]
        axes.plot(x, judged["delta"], label=label, marker=".", markersize=4, **line(i))
    for limit in (0, 0.1, 0.5):
        axes.axhline(limit, color="k", linestyle=":", linewidth=1 if limit else 0.5)
    axes.set(xscale="log", xlabel="position / training length", ylabel="rise, nats per token (dotted: 0.1 and 0.5)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return png(plt, figure)


def tracking_figure(plt: Any, curves: list[tuple[str, list[dict[str, Any]], int]]) -> bytes | None:
    """Accuracy by length with intervals; a dotted line at each training length. curves: (label, rows, T)."""
    if plt is None or not curves:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    for i, (label, rows, T) in enumerate(curves):
        rows = sorted((r for r in rows if "accuracy" in r), key=lambda r: r["length"])
        x, color = [r["length"] for r in rows], f"C{i % 10}"
        axes.plot(x, [100 * r["accuracy"] for r in rows], marker=".", label=label, **line(i))
        axes.fill_between(x, [100 * r["ci95"][0] for r in rows], [100 * r["ci95"][1] for r in rows], alpha=0.15, color=color, linewidth=0)
        axes.axvline(T, color=color, linestyle=":", linewidth=1)
    axes.set(xscale="log", ylim=(0, 103), xlabel="tokens (dotted: training length)", ylabel="right answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return png(plt, figure)


def grids_figure(plt: Any, grids: dict[str, list[dict[str, Any]]], title: str) -> bytes | None:
    """Accuracy over length (across) and depth (down), a panel for each model, all on one scale. grids: by model. None where nobody answered
    anything right anywhere: a sentence says that better."""
    grids = {model: sorted(g, key=lambda x: x["length"]) for model, g in grids.items() if g}
    if plt is None or not any(c["accuracy"] > 0 for results in grids.values() for g in results for c in g["cells"]):
        return None
    lengths = sorted({g["length"] for results in grids.values() for g in results})
    depths = sorted({c["depth"] for results in grids.values() for g in results for c in g["cells"]})
    across = min(3, len(grids))
    down = -(-len(grids) // across)
    width, height = 0.7 * len(lengths) + 0.6, 0.32 * len(depths) + 0.5
    figure, panels = plt.subplots(
        down, across, figsize=(across * width + 1.6, down * height + 1), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    image = None
    for panel in panels.flat:
        panel.set_visible(False)
    for number, (panel, (model, results)) in enumerate(zip(panels.flat, grids.items())):
        panel.set_visible(True)
        panel.tick_params(labelbottom=number + across >= len(grids))  # nothing stands below it
        by = {(g["length"], c["depth"]): c["accuracy"] for g in results for c in g["cells"]}
        values = [[by.get((n, d), float("nan")) for n in lengths] for d in depths]
        image = panel.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                panel.text(
                    j, i, "-" if v != v else f"{100 * v:.0f}", ha="center", va="center", fontsize=8, color="white" if v > 0.6 else "#333"
                )
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45, fontsize=8)
        panel.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths], fontsize=8)
        panel.set_title(model if len(model) <= 28 else model[:27] + "…", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("depth", fontsize=9)
    figure.colorbar(image, ax=panels, shrink=0.8, label="accuracy")
    return png(plt, figure)


def remembrance_figure(plt: Any, curves: list[tuple[str, dict[str, Any]]]) -> bytes | None:
    """Distance over the share of the text that was dropped, on an axis that ends a little above the largest value. curves: (label, result)."""
    if plt is None or not curves:
        return None
    figure, axes = plt.subplots(figsize=(8, 4))
    top = 0.0
    for i, (label, x) in enumerate(curves):
        curve = x["curve"]
        at = [c["dropped"] / x["length"] for c in curve]
        axes.plot(at, [c["distance"] for c in curve], marker=".", label=f"{label} (T={x['length']:,})", **line(i))
        top = max(top, *(c["distance"] for c in curve))
        if all(c["low"] is not None for c in curve):
            axes.fill_between(at, [c["low"] for c in curve], [c["high"] for c in curve], alpha=0.15, color=f"C{i % 10}", linewidth=0)
            top = max(top, *(c["high"] for c in curve))
    top = min(1.0, max(1.1 * top, 1e-4))
    axes.set(
        xlabel="share of the text dropped from its front", ylabel="total variation distance (at most 1)", ylim=(-0.02 * top, 1.02 * top)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return png(plt, figure)


def states_figure(plt: Any, x: dict[str, Any], title: str) -> bytes | None:
    """Left: standard deviation over position, a line a layer and state. Right: log2 of the growth of the variance, layers x heads. Of matrix states
    between them: effective rank over position."""
    if plt is None:
        return None
    first = x["snapshots"][0]["states"]
    matrices = [i for i, s in enumerate(first) if "effective_rank" in s]
    figure, (left, *middle, right) = plt.subplots(1, 3 if matrices else 2, figsize=(18 if matrices else 12, 4.2))
    names = [(s["layer"], s["name"]) for s in first]
    color = plt.get_cmap("viridis")
    for i, (layer, name) in enumerate(names):
        y = [(mean(s["states"][i]["variance"]) or 0) ** 0.5 for s in x["snapshots"]]
        left.plot(
            [s["position"] for s in x["snapshots"]], y, color=color(i / max(1, len(names) - 1)), marker=".", label=f"layer {layer} {name}"
        )
    left.axvline(x["train_length"], color="k", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="tokens (dotted: training length)", ylabel="standard deviation of the state", title=title)
    left.grid(alpha=0.3)
    if len(names) <= 12:
        left.legend(fontsize=7)
    for i in matrices:
        y = [mean(s["states"][i]["effective_rank"]) for s in x["snapshots"]]
        middle[0].plot([s["position"] for s in x["snapshots"]], y, color=color(i / max(1, len(names) - 1)), marker=".")
    for panel in middle:
        panel.axvline(x["train_length"], color="k", linestyle=":")
        panel.set(xscale="log", xlabel="tokens", ylabel="effective rank, mean over heads", ylim=(0, None))
        panel.grid(alpha=0.3)
    heads = max((g["head"] for g in x["growth"]), default=-1) + 1
    if heads:
        table = [[float("nan")] * heads for _ in names]
        for g in x["growth"]:
            table[names.index((g["layer"], g["name"]))][g["head"]] = math.log2(max(g["variance_ratio"], 1e-6))
        most = max(4.0, *(abs(v) for row in table for v in row if v == v))
        image = right.imshow(table, cmap="coolwarm", vmin=-most, vmax=most, aspect="auto")
        right.set_xticks(range(heads) if heads <= 16 else range(0, heads, -(-heads // 16)))
        right.set_yticks(range(len(names)), [f"{a} {b}" for a, b in names], fontsize=7)
        right.set(xlabel="head", ylabel="layer", title=f"log2 of variance at {x['length']:,} over variance at {x['train_length']:,}")
        figure.colorbar(image)
    else:
        right.axis("off")
    return png(plt, figure)
