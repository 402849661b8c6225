"""One readable modeling file from the project's own source: the template with the mixers, cells and layers it needs in front of it.

Definitions are taken as they are written, without what only training needs; imports of this project are resolved, all others kept.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

from models.hub.recurrence import HEADER, written

TEMPLATE = ("models.hub.template_cells", "models.hub.template_cache", "models.hub.template")
OURS = ("models", "kernels", "training", "data", "evals")
# by the template, where a mixer or a cell imports them
PROVIDED = {
    "parallel_rnn", "parallel_rnn_step", "dense_rnn", "dense_rnn_step", "ssd", "delta_rule", "m2rnn", "load_cell", "bias_init", "torch_functions", "jumps", "Cell",
    "linear", "linears",
    "Pre", "Rec", "Mat", "State", "LogState", "Walk",
}  # fmt: skip
# operations whose reference.py has the same functions
IN_TORCH = (
    "kernels.short_conv",
    "kernels.linear",
    "kernels.step_sizes",
    "kernels.add_norm",
    "kernels.gated_norm",
    "kernels.rotary",
    "kernels.swiglu",
    "kernels.mamba2_step",
    "kernels.delta_step",
    "kernels.m2rnn_step",
)
SCAN = {  # what kernels/ssd has under names that say nothing among others
    "forward": "ssd_on_gpu", "Problem": "Scan", "Pass": "ScanSizes", "pad": "padded_width", "ready": "with_neighbours",
    "kernels": "scan_kernels", "prepare": "scan_prepare", "walk": "scan_walk", "outputs": "scan_outputs",
    "recover": "scan_recover", "carry": "scan_carry", "carries": "scan_carries", "is_small": "scan_is_small", "SMALL": "SCAN_SMALL", "PROGRAMS": "SCAN_PROGRAMS", "ENOUGH": "SCAN_ENOUGH",
    "MORE_HEADS": "SCAN_MORE_HEADS",
}  # fmt: skip
SCAN_TEXT = """# Mamba-2's scan in Triton (arXiv 2405.21060, section 6), without gradients. Time is cut into chunks of Q steps: `scan_prepare` sums the logarithms
# of the decays within each chunk (LOW: what rounding took from them) and counts document starts, `scan_walk` carries the state from chunk to
# chunk, `scan_outputs` takes all chunks at once (`scan_carry`: both in one), `scan_recover` in order what may have left its document. b batch row, c chunk, h head, g group, i and j rows of a chunk, P head width, N state width."""
SCAN_KERNELS = '''def scan_kernels() -> Any:
    """The scan's kernels by name."""
    return SimpleNamespace(tl=tl, scan_prepare=scan_prepare, scan_walk=scan_walk, scan_outputs=scan_outputs, scan_carry=scan_carry, scan_recover=scan_recover)'''
RULE = {  # likewise kernels/delta_rule
    "forward": "rule_on_gpu", "Problem": "Rule", "pad": "whole_power", "ready": "with_whole_runs", "kernels": "rule_kernels", "sizes": "rule_tile",
    "project": "rule_project", "walk": "rule_walk", "outputs": "rule_outputs", "recover": "rule_recover", "decays": "rule_decays",
    "where_is": "place_of_chunk", "strides_of": "rule_strides", "whole_width": "rule_width", "filled": "rule_state", "NARROWEST": "RULE_NARROWEST",
    "RECOVERED": "RULE_RECOVERED", "RUN": "RULE_RUN", "NARROW": "RULE_NARROW", "WIDE": "RULE_WIDE", "Tile": "RuleTile",
}  # fmt: skip
ONLY_RULES = ("RULE", "delta_rule")  # of the template, which no model without the delta rule needs
RULE_TEXT = """# The delta rule in Triton (arXiv 2406.06484, 2412.06464), without gradients. Time is cut into chunks of 64 updates: `rule_project` sums the logarithms of
# the gates, counts document starts and solves each chunk's triangular system, `rule_walk` carries the state from chunk to chunk, `rule_outputs` takes
# all chunks at once, `rule_recover` in order what may have left its document. b batch row, h head, c chunk, i and j rows of a chunk, K and V widths of a
# key and a value, S updates, N updates a token, R heads that share a key."""
RULE_KERNELS = '''def rule_kernels() -> Any:
    """The rule's kernels by name."""
    return SimpleNamespace(tl=tl, rule_project=rule_project, rule_walk=rule_walk, rule_outputs=rule_outputs, rule_recover=rule_recover)'''
MATRIX = {  # likewise kernels/m2rnn
    "forward": "m2rnn_on_gpu", "Problem": "MatrixStates", "pad": "matrix_width", "neighbours": "matrix_neighbours", "kernels": "matrix_kernels",
    "total": "matrix_total", "WALKS": "MATRIX_WALKS", "TILES": "MATRIX_TILES", "TILES_WIDE": "MATRIX_TILES_WIDE", "Tiles": "MatrixTiles",
    "NARROWEST": "MATRIX_NARROWEST", "walk": "matrix_walk", "exact_tanh": "matrix_exact_tanh", "_tanh": "matrix_tanh", "_place": "matrix_place",
    "_weight": "matrix_weight", "_content": "matrix_content", "_vector": "matrix_vector",
}  # fmt: skip
ONLY_MATRIX = ("MATRIX", "m2rnn")
MATRIX_TEXT = """# M2RNN in Triton (arXiv 2603.14360), without gradients: `matrix_walk` takes all steps in order, a block of rows of a head's state a program. b batch
# row, h head, i block of rows, t step; K rows and V columns of a state, R heads that share a query and a key."""
MATRIX_KERNELS = '''def matrix_kernels() -> Any:
    """The kernel by its name."""
    return SimpleNamespace(tl=tl, matrix_walk=matrix_walk)'''
# what a mixer declares to training, evaluation and decoding here, and its exchange over ranks
DROPPED = {
    "flops_per_token", "state_bytes", "problems", "why_not_split", "over_ranks", "fused_step", "fixed_state", "open_state", "state_roles",
    "inner_flops_per_token", "plain_weights", "follow", "tensors_of", "grows", "cached_tokens", "named_memories", "in_segment", "at_position", "random_state", "begin_step", "learnt",
    "walk_back", "gradients",
}  # fmt: skip

ELSEWISE = {  # plans of memory are made here, not by the exported code, which has no kernels of attention either
    ("models.attend", "_ours"): "def _ours(q: Tensor) -> bool:\n    return False",
    ("models.attend", "_by_ours"): "def _by_ours(*_: Any) -> Tensor:\n    raise NotImplementedError",
    ("models.attend", "sdpa"): """def sdpa(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=grouped)""",
    ("kernels.dispatch", "planned"): "def planned() -> bool:\n    return False",
    ("kernels.dispatch", "planned_compiled"): "def planned_compiled() -> bool:\n    return False",
}


class Module:
    """The source of a module: its top-level definitions and where its other names come from."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        self.name, self.source = name, Path(spec.origin).read_text()
        self.tree = ast.parse(self.source)
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str, str]] = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in (t for whole in targets for t in (whole.elts if isinstance(whole, ast.Tuple) else [whole])):
                    if isinstance(target, ast.Name):
                        self.definitions[target.id] = node
            elif isinstance(node, ast.ImportFrom):
                for a in node.names:
                    self.imports[a.asname or a.name] = (
                        node.module or "",
                        a.name,
                        f"from {node.module} import {a.name}" + (f" as {a.asname}" if a.asname else ""),
                    )
            elif isinstance(node, ast.Import):
                for a in node.names:
                    self.imports[(a.asname or a.name).split(".")[0]] = (
                        a.name,
                        "",
                        f"import {a.name}" + (f" as {a.asname}" if a.asname else ""),
                    )


class Flattener:
    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.pieces: list[str] = []
        self.external: set[str] = set()
        self.done: set[tuple[str, int]] = set()
        self.instead = dict(ELSEWISE)  # (module, name): text written in place of the definition

    def module(self, name: str) -> Module:
        if name not in self.modules:
            self.modules[name] = Module(name)
        return self.modules[name]

    def add(self, module: str, name: str, rename: dict[str, str] | None = None) -> None:
        """The definition of `name`, after everything it uses."""
        source = self.module(module)
        if name not in source.definitions and name in source.imports:  # passed on from where it is defined
            return self._import(module, *source.imports[name])
        node: Any = source.definitions[name]
        if (module, node.lineno) in self.done or name == "triton":  # HEADER has it
            return
        self.done.add((module, node.lineno))
        if (module, name) in self.instead:
            self.pieces.append(self.instead[module, name])
            return
        if isinstance(node, ast.ClassDef):
            cut = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in DROPPED]
        else:
            cut = []
        inside = {id(child) for method in cut for child in ast.walk(method)}
        for used in (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in inside):
            if used in source.definitions and used != name:
                self.add(module, used, rename)
            elif used in source.imports:
                self._import(module, *source.imports[used])
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        gone = {i for m in cut for i in range(min([m.lineno, *(d.lineno for d in m.decorator_list)]), (m.end_lineno or 0) + 1)}
        lines = source.source.splitlines()
        for line in sorted(gone, reverse=True):  # and what is said above it
            while line > first and line - 1 not in gone and re.fullmatch(r"(\s*#.*)?", lines[line - 2]):
                line -= 1
                gone.add(line)
        text = "\n".join(lines[i - 1] for i in range(first, (node.end_lineno or 0) + 1) if i not in gone)
        text = re.sub(r"\n{3,}", "\n\n", text).rstrip()
        if cut and len(node.body) == len(cut) + (ast.get_docstring(node) is not None) and ast.get_docstring(node) is None:
            text += "\n    pass"
        for old, new in (rename or {}).items():
            text = re.sub(rf"\b{old}\b", new, text)
        self.pieces.append(text.replace("@triton.jit", "@jit"))  # of HEADER

    def _import(self, module: str, origin: str, name: str, line: str) -> None:
        if origin.split(".")[0] == "triton":  # HEADER has it
            return
        if origin.split(".")[0] not in OURS:
            self.external.add(line)
        elif name == "EverywhenConfig":
            self.external.add("from .configuration_everywhen import EverywhenConfig")
        elif module in TEMPLATE or name not in PROVIDED:
            self.add(f"{origin}.reference" if origin in IN_TORCH else origin, name)


def add_scan(flat: Flattener) -> None:
    """The forward kernels of Mamba-2's scan and what launches them: `ssd_on_gpu`."""
    flat.pieces.append(SCAN_TEXT)
    flat.external.add("from types import SimpleNamespace")
    flat.instead["kernels.ssd.launch", "kernels"] = SCAN_KERNELS
    for name in ("prepare", "walk", "outputs", "carry", "recover"):
        flat.add("kernels.ssd.triton", name, SCAN)
    flat.add("kernels.ssd.launch", "forward", SCAN)


def add_rule(flat: Flattener) -> None:
    """The forward kernels of the delta rule and what launches them: `rule_on_gpu`."""
    flat.pieces.append(RULE_TEXT)
    flat.external.add("from types import SimpleNamespace")
    flat.instead["kernels.delta_rule.launch", "kernels"] = RULE_KERNELS
    for name in ("project", "walk", "outputs", "recover"):
        flat.add("kernels.delta_rule.triton", name, RULE)
    flat.add("kernels.delta_rule.launch", "forward", RULE)


def add_matrix(flat: Flattener) -> None:
    """The forward kernel of M2RNN and what launches it: `m2rnn_on_gpu`."""
    flat.pieces.append(MATRIX_TEXT)
    flat.external.add("from types import SimpleNamespace")
    flat.instead["kernels.m2rnn.launch", "kernels"] = MATRIX_KERNELS
    flat.add("kernels.m2rnn.triton", "walk", MATRIX)
    flat.add("kernels.m2rnn.launch", "forward", MATRIX)


def _camel(kind: str) -> str:
    return "".join(part.title() for part in kind.split("_"))


def modeling(types: list[str], cells: list[str], keep_fp32: list[str], way: str | None = None) -> str:
    """The text of modeling_everywhen.py with these mixer types and cells, and a way through the depth of this type."""
    from models.cells import bias_init, load_cell
    from models.mixers import available

    flat = Flattener()
    plain, kernels, entries = written([load_cell(cell) for cell in cells])
    for part in TEMPLATE:
        for name in flat.module(part).definitions:
            if name in ("MIXERS", "WAYS", "CELLS", "BIASES", "KEEP_FP32", "SCAN", "Pre", "Rec", "Mat", "State", "LogState"):
                flat.add(part, name)
    for cell in cells:
        flat.add(f"models.cells.{cell}", "step", {"step": f"step_{cell}"})
    flat.pieces += plain
    for kind in types:
        assert kind in available(), kind
        titles = {name: f"{_camel(kind)}{name}" for name in ("Config", "State", "Mixer")}
        flat.add(f"models.mixers.{kind}", "Mixer", titles)
    if way is not None:
        flat.done.add(("models.walk", flat.module("models.walk").definitions["Walk"].lineno))  # the template has its own
        flat.add(f"models.depth.{way}", "Way", {"Config": "WayConfig"})
    rules, matrices = "delta" in types, "m2rnn" in types
    unused = (() if rules else ONLY_RULES) + (() if matrices else ONLY_MATRIX)
    for part in TEMPLATE:
        for name in flat.module(part).definitions:
            if name not in unused:
                flat.add(part, name)
    flat.pieces += kernels
    scans = "mamba2" in types
    for present, add in ((scans, add_scan), (rules, add_rule), (matrices, add_matrix)):
        if present:
            add(flat)
    tables = [
        "MIXERS.update({" + ", ".join(f'"{k}": ({_camel(k)}Config, {_camel(k)}Mixer)' for k in types) + "})",
        "CELLS.update({" + ", ".join(f'"{cell}": {entry}' for cell, entry in entries.items()) + "})",
        *([f'WAYS["{way}"] = (WayConfig, Way)'] if way is not None else []),
        *[f'BIASES["{cell}"] = {biases!r}' for cell in cells if (biases := bias_init(cell))],
        "KEEP_FP32.extend(" + str(keep_fp32).replace("'", '"') + ")",
        *(["SCAN.append(ssd_on_gpu)"] if scans else []),
        *(["RULE.append(rule_on_gpu)"] if rules else []),
        *(["MATRIX.append(m2rnn_on_gpu)"] if matrices else []),
    ]
    title = '"""An Everywhen language model for transformers, in one file. Apache-2.0.\n\nLegend: B batch, T time, D width; other letters are explained where they are used.\n"""'
    imports = "\n".join(sorted(flat.external))
    text = (
        "\n\n\n".join([f"{title}\n\nfrom __future__ import annotations\n\n{imports}\n\n{HEADER}", *flat.pieces, "\n".join(tables)]) + "\n"
    )
    _refuse_one_name_twice(text)
    return text


def _refuse_one_name_twice(text: str) -> None:
    """Of two definitions of one name the first would be lost."""
    body = ast.parse(text).body
    names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    names += [
        n.id
        for whole in body
        if isinstance(whole, ast.Assign)
        for target in whole.targets
        for n in ast.walk(target)
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    ]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"two definitions have one name in the flattened file: {twice}"
