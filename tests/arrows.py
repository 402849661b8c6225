"""The arrows between the modules of the project, read from their source: who names whom, by import or in a string.

An arrow is an import anywhere in a module (at its top, inside a function, under TYPE_CHECKING, relative) or a string that names a module to whoever
loads or starts it: `importlib.import_module("evals.run")`, `f"models.cells.{name}"` (all cells), `"training.engine.Engine"`, `[python, "-m",
"evals.run"]`, `"python -m evals.run"` or `ROOT / "scripts/bench/ssd.py"`. Docstrings are no arrows, nor are sentences that tell a person which
command to type (`moved("scripts.export")` is one, see kernels/moved.py).
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLOORS = ("kernels", "data", "models", "training", "evals", "scripts")  # from the lowest up; train.py stands on the highest
STARTS = re.compile(r"\s*(?:python3?\s+)?-m\s+([\w.]+)")  # the beginning of a command line


@dataclass(frozen=True)
class Arrow:
    """`source` names `target` in `line` of `path`."""

    source: str
    target: str
    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.source} -> {self.target}"


def floor(module: str) -> int:
    first = module.partition(".")[0]
    return FLOORS.index("scripts" if first == "train" else first)


def modules(root: Path) -> dict[str, Path]:
    """The files of the project by the names under which they are imported; a package by its own name."""
    files = [path for name in FLOORS for path in sorted((root / name).rglob("*.py"))]
    named = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return {**named, **({"train": root / "train.py"} if (root / "train.py").is_file() else {})}


class Reader:
    """Reads the arrows that leave one module."""

    def __init__(self, module: str, path: Path, root: Path, known: dict[str, Path]) -> None:
        self.module, self.known = module, known
        self.path = str(path.relative_to(root))
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))

    def arrows(self) -> Iterator[Arrow]:
        prose = self._for_people()
        for node in self.nodes:
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [known for alias in node.names if (known := self._within(alias.name, 1))]
            elif isinstance(node, ast.ImportFrom):
                targets = self._imported_from(node)
            elif isinstance(node, ast.JoinedStr):
                prose |= {id(part) for part in node.values}
                targets = self._formatted(node)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                targets = self._named(node.value)
            for target in targets:
                if target != self.module:
                    yield Arrow(self.module, target, self.path, getattr(node, "lineno", 0))

    def _for_people(self) -> set[int]:
        """The nodes of strings that only people read: docstrings, and where a command has moved to."""
        moved = [n.args for n in self.nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "moved"]
        return {id(n.value) for n in self.nodes if isinstance(n, ast.Expr)} | {id(word) for words in moved for word in words}

    def _imported_from(self, node: ast.ImportFrom) -> list[str]:
        base = node.module or ""
        if node.level:
            parts = self.package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        whole = [f"{base}.{alias.name}" for alias in node.names]
        return sorted({name if name in self.known else base for name in whole} & self.known.keys())

    def _within(self, dotted: str, least: int) -> str:
        """The module that `dotted`, a module or something in one, lies in, if its name has `least` parts at least; else ''."""
        parts = dotted.split(".")
        return next((name for n in range(len(parts), least - 1, -1) if (name := ".".join(parts[:n])) in self.known), "")

    def _named(self, text: str) -> list[str]:
        """The module a string names. One of a single part (`data`) is any word, and `data.path` may be a setting: two parts have to be a module's."""
        if command := STARTS.match(text):
            return [name for name in [self._within(command[1], 1)] if name]
        if text.endswith(".py") and "/" in text or text == "train.py":
            dotted = text.removesuffix(".py").replace("/", ".")
            return [name for name in self.known if dotted == name or dotted.endswith("." + name)]
        if re.fullmatch(r"[A-Za-z_]\w*(?:[.:][A-Za-z_]\w*)+", text):
            return [name for name in [self._within(text.replace(":", "."), 2)] if name]
        return []

    def _formatted(self, node: ast.JoinedStr) -> list[str]:
        """`f"models.cells.{name}"` names every module of the package, and so does `f"{__name__}.{name}"` in it."""
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) and part.value.id == "__name__":
                text += self.module
            else:
                break
        if re.fullmatch(r"(?:\w+\.)+", text) and text[:-1] in self.known:
            return [name for name in self.known if name.startswith(text)]
        return self._named(text) if STARTS.match(text) else []


def all_arrows(root: Path) -> list[Arrow]:
    known = modules(root)
    return [arrow for module, path in known.items() for arrow in Reader(module, path, root, known).arrows()]


def upward(arrows: list[Arrow]) -> list[Arrow]:
    """Those that lead to a higher floor."""
    return [arrow for arrow in arrows if floor(arrow.target) > floor(arrow.source)]


def circles(arrows: list[Arrow]) -> list[list[Arrow]]:
    """The arrows inside each set of modules that can all be reached from one another (Tarjan's components)."""
    out: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows:
        out[arrow.source].add(arrow.target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    components: list[set[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        path.append(module)
        for target in sorted(out[module]):
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in path:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            start = path.index(module)
            components.append(set(path[start:]))
            del path[start:]

    for module in sorted(out):
        if module not in order:
            visit(module)
    return [[a for a in arrows if a.source in c and a.target in c] for c in components if len(c) > 1]
