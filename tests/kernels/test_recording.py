"""While a CUDA graph is recorded Python's collector waits, and nothing outside of benches records one without that."""

from __future__ import annotations

import ast
import gc
import weakref

import pytest

from kernels.recording import undisturbed
from tests.conftest import ROOT

FLOORS = ("kernels", "data", "models", "training", "evals", "scripts/studies", "scripts/board")


class Ring:
    """What only the collector lets go."""

    def __init__(self) -> None:
        self.me = self


def test_the_collector_waits_and_is_then_as_it_was() -> None:
    before, thresholds = gc.isenabled(), gc.get_threshold()
    gc.enable()
    gc.set_threshold(1, 1, 1)
    try:
        with undisturbed():
            ring = weakref.ref(Ring())
            grown = [[n] for n in range(1000)]  # an allocation that would have it come by
            with undisturbed():
                pass
            grown += [[n] for n in range(1000)]
            assert ring() is not None and not gc.isenabled()
        assert gc.isenabled() and grown
        with pytest.raises(KeyError), undisturbed():
            raise KeyError
        assert gc.isenabled()
        gc.disable()
        with undisturbed():
            pass
        assert not gc.isenabled()
    finally:
        gc.set_threshold(*thresholds)
        (gc.enable if before else gc.disable)()
        gc.collect()
    assert ring() is None


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(name)]


def test_whoever_records_a_graph_has_the_collector_wait() -> None:
    recorded = 0
    for file in (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "cuda.graph(" not in text and "capture_begin(" not in text:
            continue
        tree = ast.parse(text)
        recordings = calls(tree, "cuda.graph") + calls(tree, ".capture_begin")
        quiet = [node for node in ast.walk(tree) if isinstance(node, ast.With) and calls(node.items[0].context_expr, "undisturbed")]
        inside = {id(n) for node in quiet for n in ast.walk(node)}
        assert all(id(call) in inside for call in recordings), f"{file} records a graph while the collector may come by"
        recorded += len(recordings)
    assert recorded >= 4
