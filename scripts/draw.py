"""Draws the pictures of README and docs into docs/pictures, from the code that they show.

    python -m scripts.draw             writes docs/pictures/model.svg and data.svg, and docs/results/long_context/million.png

model.svg: the parts of a hybrid in the order in which a forward pass calls them, so that a part that is added, renamed or moved changes the
picture. data.svg: the way of the data; each box names a module and something in it, each arrow the module that joins its two ends.
tests/test_pictures.py draws both again and compares. million.png: the curves of docs/results/long_context/million.json.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from data.program import program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "pictures"
MILLION = ROOT / "docs" / "results" / "long_context" / "million.json"
FLOORS = {
    "kernels": "#fde9c9",
    "data": "#d9ecd0",
    "models": "#d4e4f7",
    "training": "#e8dcf3",
    "evals": "#f9d9dc",
    "scripts": "#e6e6e6",
}
SANS, MONO = 0.5, 0.61  # width of a letter over the size of its type


@dataclass
class Sheet:
    """A drawing of `width` x `height` pixels on white; text that would not fit its box is an error."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: int = 13, *, mono: bool = False, bold: bool = False, middle: bool = True) -> None:
        family = "ui-monospace,Menlo,Consolas,monospace" if mono else "Helvetica,Arial,sans-serif"
        style = f'font-family="{family}" font-size="{size}"' + (' font-weight="bold"' if bold else "")
        anchor = ' text-anchor="middle"' if middle else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}{anchor} fill="#222">{escape(words, quote=False)}</text>')

    def box(self, x: float, y: float, w: float, h: float, title: str, lines: list[str], colour: str, *, mono: str = "") -> None:
        """A titled box with lines of text, and a last one in typewriter letters."""
        for words, size, letter in [(title, 14, SANS), *((line, 12, SANS) for line in lines), (mono, 11, MONO)]:
            if len(words) * size * letter > w:
                raise ValueError(f"{words!r} does not fit into a box of {w:g} pixels.")
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="7" fill="{colour}" stroke="#555"/>')
        middle, below = x + w / 2, y + h / 2 + 5 - (17 * len(lines) + 17 * bool(mono)) / 2
        self.text(middle, below, title, 14, bold=True)
        for line in lines:
            below += 17
            self.text(middle, below, line, 12)
        if mono:
            self.text(middle, below + 17, mono, 11, mono=True)

    def line(self, *points: tuple[float, float], arrow: bool = True, dashed: bool = False) -> None:
        """Through `points`, with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        style = ' stroke-dasharray="4 4" stroke="#999"' if dashed else ' stroke="#333"'
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(f'<polyline points="{path}" fill="none"{style} stroke-width="1.5"{head}/>')

    def plus(self, x: float, y: float) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#fff" stroke="#333" stroke-width="1.5"/>')
        self.text(x, y + 5, "+", 16)

    def svg(self) -> str:
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker>'
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        back = f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#fff"/>'
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<defs>{head}</defs>", back, *self.parts, "</svg>"]) + "\n"


# The model


@dataclass
class Parts:
    """What a hybrid is made of: the pattern of its layers, and the children of model, block and recurrent mixer as called."""

    pattern: list[str]
    model: list[str]
    block: list[str]
    mixer: list[str]
    step: str  # the cell's step: what it is given


def parts_of_a_hybrid() -> Parts:
    """Runs configs/model/hybrid.yaml on a few tokens and notes which part is called after which."""
    import torch

    from models.config import ModelConfig
    from models.lm import LanguageModel
    from models.mixers.rnn import Mixer
    from training.config.cli import checked, compose_config

    settings = {**checked(compose_config(["model=hybrid", "size=tiny"])).model, "vocab_size": 64}
    model = LanguageModel(ModelConfig.from_dict(settings))
    model.init_weights(0)
    block = next(b for b in model.blocks if isinstance(b.mixer, Mixer))

    def calls(module: torch.nn.Module) -> list[str]:
        called: list[str] = []
        hooks = []
        for name, child in module.named_children():
            for part in child if isinstance(child, torch.nn.ModuleList) else [child]:
                hooks.append(part.register_forward_hook(lambda *_, name=name: called.append(name)))
        model(torch.arange(8)[None], labels=torch.arange(8)[None])
        for hook in hooks:
            hook.remove()
        return list(dict.fromkeys(called))

    cell = block.mixer.cell
    step = f"h_t = step({', '.join((*cell.pre, *cell.rec, 'h_{t-1}'))})"
    return Parts(list(model.config.pattern), calls(model), calls(block), calls(block.mixer), step)


TITLES = {
    "embedding": ("embedding", ""),
    "blocks": ("blocks", ""),
    "norm": ("norm", ""),
    "head": ("head and loss", "in pieces, never all logits"),
    "mixer_norm": ("norm", ""),
    "mixer": ("sequence mixer", "along time"),
    "mlp_norm": ("norm", ""),
    "mlp": ("SwiGLU MLP", "each token alone"),
    "in_proj": ("in-projection", "and gate"),
    "conv": ("convolution", "short, causal; SiLU"),
    "out_proj": ("out-projection", ""),
}


def model_svg(parts: Parts) -> str:
    """The model, a block of it, and the recurrent mixer in the block, one below the other; dashed lines lead from a part to its inside."""
    sheet = Sheet(1000, 396)
    left, right, below = _draw_model(sheet, parts, 48)
    _inside(sheet, left, right, below, 138, "A block")
    left, right, below = _draw_block(sheet, parts, 208)
    _inside(sheet, left, right, below, 264, "A recurrent mixer")
    _draw_mixer(sheet, parts, 340)
    return sheet.svg()


def _inside(sheet: Sheet, left: float, right: float, below: float, y: float, title: str) -> None:
    """Widens the part between `left` and `right`, whose lower edge is `below`, to the row that begins at `y`."""
    sheet.line((left, below), (20, y + 4), arrow=False, dashed=True)
    sheet.line((right, below), (980, y + 4), arrow=False, dashed=True)
    sheet.text(20, y + 22, title, 15, bold=True, middle=False)


def _draw_model(sheet: Sheet, parts: Parts, y: float) -> tuple[float, float, float]:
    """The row of the model; returns left and right edge of the first block, and the lower edge of all."""
    sheet.text(20, 34, "The model", 15, bold=True, middle=False)
    h, x = 62.0, 72.0
    sheet.text(42, y + h / 2 + 5, "tokens", 13)
    first = (0.0, 0.0)
    for name in parts.model:
        w = {"blocks": 478.0, "head": 170.0, "norm": 70.0}.get(name, 110.0)
        sheet.line((x, y + h / 2), (x + 20, y + h / 2))
        x += 20
        if name == "blocks":
            sheet.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="7" fill="#fff" stroke="#555"/>')
            sheet.text(x + w / 2, y + h - 7, "blocks, repeated: the order of mixers is a setting, model.pattern", 12)
            each = (w - 16) / len(parts.pattern)
            for i, mixer in enumerate(parts.pattern):
                sheet.box(x + 10 + i * each, y + 6, each - 4, 34, mixer, [], FLOORS["models"])
            first = (x + 10, x + 6 + each)
        else:
            title, line = TITLES.get(name, (name, ""))
            sheet.box(x, y, w, h, title, [line] if line else [], FLOORS["models"])
        x += w
    return (*first, y + h)


def _draw_block(sheet: Sheet, parts: Parts, middle: float) -> tuple[float, float, float]:
    """The row of a block, each norm and what follows it beside a residual path; returns the edges of the mixer."""
    norm, part, x, mixer = 90.0, 190.0, 54.0, (0.0, 0.0)
    sheet.text(44, middle + 5, "x", 14)
    for name in parts.block:
        title, line = TITLES.get(name, (name, ""))
        if name.endswith("norm"):
            branch, plus = x + 12, x + 34 + norm + 20 + part + 42
            sheet.line((branch, middle), (branch, middle - 34), (plus, middle - 34), (plus, middle - 11))
            sheet.line((x, middle), (x + 34, middle))
            sheet.box(x + 34, middle - 26, norm, 52, title, [], FLOORS["models"])
            x += 34 + norm
        else:
            sheet.line((x, middle), (x + 20, middle))
            sheet.box(x + 20, middle - 26, part, 52, title, [line], FLOORS["models"])
            mixer = (x + 20, x + 20 + part) if name == "mixer" else mixer
            x += 20 + part
            sheet.line((x, middle), (x + 32, middle))
            sheet.plus(x + 42, middle)
            x += 52
    sheet.line((x, middle), (x + 24, middle))
    return (*mixer, middle + 26)


def _draw_mixer(sheet: Sheet, parts: Parts, middle: float) -> None:
    """The row of the recurrent mixer. The cell's recurrence is a function and no part that is called: it comes before the norm."""
    x = 20.0
    for name in parts.mixer:
        title, line = TITLES.get(name, (name, ""))
        if name == "norm":
            sheet.line((x, middle), (x + 20, middle))
            lines = ["solved over slices of time in parallel,", "certified to be what the loop gives"]
            sheet.box(x + 20, middle - 42, 320, 84, "the cell, for all t at once", lines, FLOORS["kernels"], mono=parts.step)
            x, title = x + 340, "norm, gate"
        wide = 140.0 if line else 118.0
        sheet.line((x, middle), (x + 20, middle))
        sheet.box(x + 20, middle - 32, wide, 64, title, [line] if line else [], FLOORS["models"])
        x += 20 + wide
    sheet.line((x, middle), (x + 20, middle))


# The way of the data


@dataclass(frozen=True)
class Box:
    """A station of the data: `name` is something in `module`; column and row are its place."""

    title: str
    line: str
    module: str
    name: str
    column: int
    row: int


@dataclass(frozen=True)
class Arrow:
    """From one box to another. `through` is the module that joins them: it imports each end, is imported by it, or is the end."""

    start: str
    end: str
    through: str


CHECKPOINTS = "models.checkpoint"  # writes down what a checkpoint is, finds and reads it
BOXES = [
    Box("documents", "text, JSON, tables, Hub", "data.corpus", "Corpus", 0, 0),
    Box("tokens", "one tokenizer, ids", "data.encode", "Encoder", 1, 0),
    Box("shards", "ids, starts, checksums", "data.shards", "ShardSet", 2, 0),
    Box("order", "sample k by arithmetic", "data.order", "Permutation", 0, 1),
    Box("batches", "rows of T, documents apart", "data.loader", "BatchLoader", 1, 1),
    Box("blocks", "mixers and MLPs", "models.block", "Block", 2, 1),
    Box("loss", "sums, not means", "models.lm", "LMOutput", 3, 1),
    Box("step", "gradients over ranks", "training.engine", "Engine", 4, 1),
    Box("Hub", "a verified folder", "models.hub.export", "write_folder", 1, 2),
    Box("text", "from a carried state", "scripts.generate", "main", 2, 2),
    Box("evaluation", "suites, report", "evals.run", "main", 3, 2),
    Box("checkpoint", "by all ranks, hashed", "training.saving.saver", "Saver", 4, 2),
]
ARROWS = [
    Arrow("documents", "tokens", "data.prepare"),
    Arrow("tokens", "shards", "data.prepare"),
    Arrow("shards", "batches", "data.loader"),
    Arrow("order", "batches", "data.loader"),
    Arrow("batches", "blocks", "training.engine"),
    Arrow("blocks", "loss", "models.lm"),
    Arrow("loss", "step", "train"),
    Arrow("step", "checkpoint", "training.saving.saver"),
    Arrow("checkpoint", "evaluation", CHECKPOINTS),
    Arrow("checkpoint", "text", CHECKPOINTS),
    Arrow("checkpoint", "Hub", CHECKPOINTS),
]


def data_svg() -> str:
    """Three rows: prepared once, every step, and what is done with a checkpoint."""
    w, h, gap, left, head = 204, 74, 20, 20, 30
    sheet = Sheet(left + 5 * w + 4 * gap + 20, 430)
    at = {b.title: (left + b.column * (w + gap), head + 10 + b.row * 122) for b in BOXES}
    for row, words in enumerate(["once, by python -m data.prepare", "every step, by train.py", "with a checkpoint"]):
        place = min(at[b.title][0] for b in BOXES if b.row == row)
        sheet.text(place, head + row * 122, words, 13, bold=True, middle=False)
    for arrow in ARROWS:
        (x0, y0), (x1, y1) = at[arrow.start], at[arrow.end]
        if y0 == y1 and x1 > x0:
            sheet.line((x0 + w, y0 + h / 2), (x1, y1 + h / 2))
        elif y0 == y1:  # leftwards, below the boxes between
            sheet.line((x0 + w / 2, y0 + h), (x0 + w / 2, y0 + h + 24), (x1 + w / 2, y1 + h + 24), (x1 + w / 2, y1 + h))
        elif x0 == x1:
            sheet.line((x0 + w / 2, y0 + h), (x1 + w / 2, y1))
        else:
            sheet.line((x0 + w / 2, y0 + h), (x0 + w / 2, y0 + h + 14), (x1 + w / 2, y0 + h + 14), (x1 + w / 2, y1))
    for box in BOXES:
        sheet.box(*at[box.title], w, h, box.title, [box.line], FLOORS[box.module.split(".")[0]], mono=f"{box.module}.{box.name}")
    x = left
    for room in dict.fromkeys(b.module.split(".")[0] for b in BOXES):
        sheet.parts.append(f'<rect x="{x}" y="402" width="14" height="14" rx="3" fill="{FLOORS[room]}" stroke="#555"/>')
        sheet.text(x + 20, 414, f"{room}/", 12, mono=True, middle=False)
        x += 100
    return sheet.svg()


def pictures() -> dict[str, str]:
    """The text of each SVG by its name in docs/pictures."""
    return {"model.svg": model_svg(parts_of_a_hybrid()), "data.svg": data_svg()}


# Curves


def draw_million(path: Path) -> None:
    """Time and peak memory by the number of tokens that were read with a carried state, of each model in `path`; a PNG beside it."""
    from evals.report.figures import pyplot

    plt, models = pyplot(), json.loads(path.read_text())["models"]
    if plt is None:
        sys.exit("The curves need matplotlib: pip install matplotlib.")
    most = max(row["peak_memory_bytes"] for model in models.values() for row in model["passes"].values()) / 1e9
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, model in models.items():
        rows = sorted(model["passes"].values(), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in rows]
        axes[0].plot(tokens, [row["seconds"] for row in rows], "o-", label=name)
        axes[1].plot(tokens, [row["peak_memory_bytes"] / 1e9 for row in rows], "o-", label=name)
    axes[0].set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
    axes[1].set(xscale="log", ylim=(0, 1.2 * most), xlabel="tokens", ylabel="peak memory, GB")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(words: list[str]) -> int:
    if words:
        raise UserError(f"Unknown argument {words[0]!r}; it draws what is in docs, and takes none.")
    OUT.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (OUT / name).write_text(text)
        print(OUT / name)
    draw_million(MILLION)
    print(MILLION.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
