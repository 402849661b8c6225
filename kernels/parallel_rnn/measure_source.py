"""Emits what a pass over a slice measures for the certificate, and the certificate itself (docs/parallel_solve.md).

Names in the generated source, all per channel; i, j are states, and a part is what lies between two marks:
    J{i}{j}     product of the Jacobians from the slice's start to here      P{i}{j}  likewise from the start of the part
    A{i}{j}     largest absolute product from the slice's start to any step  Q{i}{j}  likewise from the start of the part
    G{i}{j}     ... from a mark to any later step                            R{i}{j}  ... from a mark to here
    M{i}        largest absolute state of the slice                          L{i}     ... of its last eighth
    H{i}        what is left here of a change of some earlier state by its own size: the largest of product times state
Where a state may be at a kink (of relu, say), products of the Jacobians' bounds on either side stand for these: B{i}{j} for |P|, K{i}{j} for |J|.
Where states mix, products of absolute values stand for absolute values of products: upper bounds. States are looked at once a group of steps.
What a part measures costs a step one operation for one state; the rest is paid at marks. What is not a number stays so in A, G and M, and is
never accepted.
"""

from __future__ import annotations

from kernels.parallel_rnn.writer import Writer


def rows(n: int) -> int:
    """Rows of D values that a slice's measures take: A, G, M, L."""
    return 2 * n * n + 2 * n


def begin(w: Writer, indent: int, like: str, meets: bool = True) -> None:
    """Nothing walked yet. like: a tensor of the tile's shape made of zeros. meets: whether walks may meet, which needs all but J, A and M."""
    for name in ("JAGRP" + "KB" * w.kinks if meets else "JA" + "K" * w.kinks):
        w.put(indent, *(f"{name}{i}{j} = {like} + {float(i == j)}" for i in w.S for j in w.S))
    w.put(indent, *(f"M{i} = {like}" for i in w.S))
    if meets:
        w.put(indent, *w.matrix(f"Q{{i}}{{j}} = {like}"), *(f"L{i} = {like}" for i in w.S), *(f"H{i} = tl.abs(h{i})" for i in w.S))


def step(w: Writer, indent: int, u: int, meets: bool) -> None:
    """After step u of a group with the Jacobian j, from states that a reset r{u} made zero. Without meetings there is no need of parts."""
    product, bound, most = ("P", "B", "Q") if meets else ("J", "K", "A")
    for j, J in (("j", product), ("b", bound)) if w.kinks else (("j", product),):
        _multiply(w, indent, u, j, J)
    here = f"{bound}{{i}}{{j}}" if w.kinks else f"tl.abs({product}{{i}}{{j}})"
    w.put(indent, *w.matrix(f"{most}{{i}}{{j}} = _most({most}{{i}}{{j}}, {here})"))


def _multiply(w: Writer, indent: int, u: int, j: str, J: str) -> None:
    """J = j J, of what is left of J by a reset."""
    w.put(indent, "if HAS_RESET:", *(f"    {line}" for line in w.matrix(f"{J}{{i}}{{j}} = tl.where((r{u} != 0) & go, 0.0, {J}{{i}}{{j}})")))
    w.put(indent, *(f"k{i}{k} = {w.product(f'{j}{{i}}{{m}}', f'{J}{{m}}{{j}}', i, k)}" for i in w.S for k in w.S))
    w.put(indent, *w.matrix(f"{J}{{i}}{{j}} = _keep(go, k{{i}}{{j}}, {J}{{i}}{{j}}, EVEN)"))


def group(w: Writer, indent: int, meets: bool) -> None:
    """At the end of a group of steps."""
    if meets:
        w.put(indent, *(f"L{i} = tl.where(t >= tail, _most(L{i}, tl.abs(h{i})), L{i})" for i in w.S))
    w.put(indent, *(f"M{i} = _most(M{i}, tl.abs(h{i}))" for i in w.S))


def part(w: Writer, indent: int) -> None:
    """At a mark and at the slice's end: what the part came to."""
    whole, here = ("K{m}{j}", "B{i}{m}") if w.kinks else ("tl.abs(J{m}{j})", "tl.abs(P{i}{m})")
    w.put(indent, *(f"A{i}{j} = _most(A{i}{j}, {w.product('Q{i}{m}', whole, i, j)})" for i in w.S for j in w.S))
    w.put(indent, *(f"G{i}{j} = _most(G{i}{j}, {w.product('Q{i}{m}', 'R{m}{j}', i, j)})" for i in w.S for j in w.S))
    w.put(indent, *(f"k{i}{j} = {w.product(here, 'R{m}{j}', i, j)}" for i in w.S for j in w.S))
    w.put(indent, *(f"R{i}{j} = " + (f"_most(k{i}{j}, 1.0)" if i == j else f"k{i}{j}") for i in w.S for j in w.S))
    w.put(indent, *(f"H{i} = _most(tl.abs(P{i}{i}) * H{i}, tl.abs(h{i}))" for i in w.S))
    for P, J in (("P", "J"), ("B", "K")) if w.kinks else (("P", "J"),):
        w.put(indent, *(f"k{i}{j} = {w.product(f'{P}{{i}}{{m}}', f'{J}{{m}}{{j}}', i, j)}" for i in w.S for j in w.S), *w.matrix(f"{J}{{i}}{{j}} = k{{i}}{{j}}"))
        w.put(indent, *(f"{P}{i}{j} = tl.zeros_like(A{i}{j}) + {float(i == j)}" for i in w.S for j in w.S))
    w.put(indent, *w.matrix("Q{i}{j} = tl.zeros_like(A{i}{j})"))


def lift(w: Writer, indent: int) -> None:
    """A at the end of a slice: a product that became too small for fp32 may have grown again, unseen."""
    w.put(indent, *w.matrix("A{i}{j} = _most(A{i}{j}, 1.0e-30 * G{i}{j})"))


def store(w: Writer, indent: int) -> None:
    n = len(w.S)
    w.put(indent, f"om = (b * n + s) * {rows(n)} * D + d")
    w.put(indent, *(f"tl.store(MEASURES + om + {k} * D, {name}, mask=inside)" for k, name in enumerate(_names(w))))


def load(w: Writer, indent: int, names: str) -> None:
    """The measures `names`, of AGML, that the slice's last walk left, as oA{i}{j} and so on."""
    w.put(indent, f"om = (b * n + s) * {rows(len(w.S))} * D + d")
    w.put(indent, *(f"o{name} = {w.vector('MEASURES', 'om', k)}" for k, name in enumerate(_names(w)) if name[0] in names))


def _names(w: Writer) -> list[str]:
    return [*w.matrix("A{i}{j}"), *w.matrix("G{i}{j}"), *(f"M{i}" for i in w.S), *(f"L{i}" for i in w.S)]


def effect(w: Writer, indent: int, to: str, change: str, growth: str, largest: str, before: str = "") -> None:
    """to = what a change of the states does to later ones, relative to the largest of them or, where that is more, to what a change of an
    earlier state by its own size (`before`) would do: the certificate's measure. Forms over i and j."""
    for i in w.S:
        total = " + ".join(f"_times({growth.format(i=i, j=j)}, tl.abs({change.format(i=j)}))" for j in w.S)
        w.put(indent, f"size = {largest.format(i=i)}")
        if before:
            w.put(indent, *(f"size = tl.maximum(size, _times({growth.format(i=i, j=j)}, {before.format(i=j)}))" for j in w.S))
        w.put(indent, f"{to} = _share({total}, size)" if i == 0 else f"{to} = tl.maximum({to}, _share({total}, size))")


def met(w: Writer, indent: int) -> None:
    """Measures of a slice whose new walk (as measured until `met` became true) met the old one (prefix o), which stands from there on."""
    for name, before, old in (("A", "K{m}{j}" if w.kinks else "tl.abs(J{m}{j})", "oG{i}{m}"), ("G", "R{m}{j}", "oG{i}{m}")):
        w.put(indent, *(f"{name}{i}{j} = tl.where(met != 0, _most({name}{i}{j}, {w.product(old, before, i, j)}), {name}{i}{j})" for i in w.S for j in w.S))
    w.put(indent, *(f"M{i} = tl.where(met != 0, _most(M{i}, oL{i}), M{i})" for i in w.S), *(f"L{i} = tl.where(met != 0, oL{i}, L{i})" for i in w.S))
