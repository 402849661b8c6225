"""One report of everything measured under a folder: report.md and a self-contained report.html with the plots inside.

    python -m evals.report OUT

Everything is drawn from the JSON files OUT/MODEL/items/*.json, so a report can be made again at any time, or of several folders copied together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report.figures import curves_figure, grids_figure, mean, pyplot, remembrance_figure, rise_figure, states_figure, tracking_figure
from evals.report.page import Page
from evals.report.records import Records, done, read
from training.config.arguments import program
from training.errors import UserError


def documents_section(page: Page, plt: Any, records: Records) -> None:
    """Perplexity and bits per byte of documents, with their intervals, by model."""
    rows = []
    for model, items in records.items():
        for x in (r["result"] for r in items):
            sizes = [x["documents"], x["tokens"], x["bytes"]]
            figures = [value for key in ("bits_per_byte", "perplexity") for value in (x[key], _between(x, key))]
            rows.append([model, *_text_of(x), *sizes, *figures])
    page.table("model,text,sha256,held out,documents,tokens,bytes,bits/byte,95 %,perplexity,95 %".split(","), rows)


def _text_of(x: dict[str, Any]) -> list[str]:
    """Name and hash of the text of a result, and whether it was held out from the model's training."""
    text, exposure = x.get("text") or {}, x.get("seen") or {}
    status = str(exposure.get("status", "not known"))
    share = f" ({100 * exposure['share']:.0f} % of it)" if status == "partly trained on" and exposure.get("share") else ""
    held_out = {"held out": "yes", "not known": "not known"}.get(status, f"no: {status}{share}")
    return [str(text.get("name", x.get("source", "-"))), str(text.get("sha256", "-"))[:12], held_out]


def texts(page: Page, records: Records) -> None:
    """The text that everything was measured on, with its hash, and what is known of each model and it; a warning where models had different texts."""
    by_hash: dict[str, dict[str, Any]] = {}
    exposure_by: dict[tuple[str, str], dict[str, Any]] = {}
    for model, items in records.items():
        for r in items:
            result = r.get("result") or {}
            if isinstance(text := result.get("text"), dict) and text.keys() >= {"name", "sha256", "documents", "bytes"}:
                by_hash[text["sha256"]] = text
                exposure_by[(model, text["sha256"])] = result.get("seen") or {}
    if not by_hash:
        return
    page.head("Text")
    if len(by_hash) > 1:
        page.say(
            "These results are of different texts: figures can be compared only where the hash is the same. One command with all models gives them one text."
        )
    for sha, text in by_hash.items():
        note = f", {text['note']}" if text.get("note") else ""
        page.say(f"{text['name']} (sha256 {sha}): {text['documents']:,} documents, {text['bytes']:,} bytes{note}.")
    rows = [
        [m, *_text_of({"text": by_hash[sha], "seen": exposure})[1:], exposure.get("why", "-")] for (m, sha), exposure in exposure_by.items()
    ]
    page.table(["model", "sha256", "held out", "why"], rows)
    notes = [[m, r["item"], r["result"]["note"]] for m, items in records.items() for r in items if (r.get("result") or {}).get("note")]
    page.table(["model", "item", "what to know of its text"], notes)


def _between(x: dict[str, Any], key: str) -> str:
    """The interval of a figure of a result."""
    low, high = x.get(f"{key}_low"), x.get(f"{key}_high")
    return "-" if low is None or high is None else f"{low:.4g}-{high:.4g}"


def tracking_section(page: Page, plt: Any, records: Records) -> None:
    """Accuracy by length on the generated task of each model's training."""
    lengths = sorted({row["length"] for items in records.values() for r in items for row in r["result"]["lengths"]})
    rows, curves = [], []
    for model, items in records.items():
        for x in (r["result"] for r in items):
            by = {row["length"]: row for row in x["lengths"]}
            cells = []
            for n in lengths:
                row = by.get(n, {})
                low, high = row.get("ci95", (0, 0))
                cells.append(
                    f"{100 * row['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})" if "accuracy" in row else row.get("error", "-")
                )
            chance = next((row["chance"] for row in x["lengths"] if "chance" in row), None)
            rows.append([model, x["task"]["name"], x["train_length"], x["sequences"], *cells, chance and f"{100 * chance:.1f}"])
            curves.append((f"{model} ({x['task']['name']})", x["lengths"], x["train_length"]))
    page.table(["model", "task", "trained at", "sequences", *[f"{n:,}" for n in lengths], "chance"], rows)
    page.figure("state_tracking", tracking_figure(plt, curves), "Right answers by length, 95 % intervals")


def position_section(page: Page, plt: Any, records: Records) -> None:
    """What becomes of the loss beyond the training length, and its curves by prompt."""
    rows = []
    for model, items in records.items():
        for r in items:
            result, c = r["result"], r["result"]["collapse"]
            row = [model, result.get("source", result["prompt"]), _reached(result), result["rows"]]
            row += [result["perplexity"], result.get("bits_per_byte")]
            row += [c.get(key) for key in ("delta_at_end", "onset_0.1", "onset_0.5", "forgets_2x", "verdict")]
            rows.append([*row, f"{result['tokens_per_second']:,.0f}", _gib(result.get("peak_memory_bytes"))])
    columns = "model,text,length,rows,perplexity,bits/byte,delta at end,onset 0.1,onset 0.5,passes 2x,verdict,tokens/s,peak GiB".split(",")
    page.table(columns, rows)
    for prompt in sorted({r["result"]["prompt"] for items in records.values() for r in items}):
        curves = [
            (m, r["result"]["buckets"], r["settings"].get("T"))
            for m, items in records.items()
            for r in items
            if r["result"]["prompt"] == prompt
        ]
        page.figure(
            f"position-{prompt}", curves_figure(plt, curves, f"Loss by position, {prompt}"), f"Loss by position on {prompt}, 95 % intervals"
        )
        rises = [
            (m, r["result"]["buckets"], r["result"]["collapse"])
            for m, items in records.items()
            for r in items
            if r["result"].get("same_in_windows") and r["result"]["prompt"] == prompt
        ]
        caption = f"{prompt}: loss above that of the same tokens in windows of the training length"
        page.figure(f"rise-{prompt}", rise_figure(plt, rises, f"Rise beyond the training length, {prompt}"), caption)


def _reached(x: dict[str, Any]) -> Any:
    """Tokens of a row, and how many were asked for where the text did not reach."""
    asked = x.get("asked_length", 0) - 1
    return f"{x['length']:,} of {asked:,}" if x["length"] < asked else x["length"]


def _gib(value: Any) -> Any:
    """Bytes in GiB."""
    return None if value is None else f"{value / 2**30:.2f}"


def retrieval_section(page: Page, plt: Any, records: Records) -> None:
    """Accuracy by task and length beside what a guess and a copier score, and the grids."""
    lengths = sorted({r["result"]["length"] for items in records.values() for r in items})
    for task in sorted({r["result"]["task"] for items in records.values() for r in items}):
        rows = []
        for model, items in records.items():
            by_length = {r["result"]["length"]: r["result"] for r in items if r["result"]["task"] == task}
            cells = [
                f"{100 * g['accuracy']:.0f} ({100 * g['low']:.0f}-{100 * g['high']:.0f})" if (g := by_length.get(n)) else "-"
                for n in lengths
            ]
            beside = {k: v for g in by_length.values() for k, v in g.get("without_reading", {}).items()}
            best = {k: max(g.get("without_reading", {}).get(k, 0.0) for g in by_length.values()) for k in beside}
            copier = max((v, k) for k, v in best.items() if k != "chance") if len(best) > 1 else None
            rows.append(
                [model, *cells, f"{100 * best['chance']:.3g}" if best else "-", f"{100 * copier[0]:.0f} ({copier[1]})" if copier else "-"]
            )
        page.say(task)
        page.table(["model", *[f"{n:,}" for n in lengths], "chance", "best copier"], rows)
        grids = {
            model: [r["result"] for r in items if r["result"]["task"] == task and len(r["result"]["cells"]) > 1]
            for model, items in records.items()
        }
        drawn = grids_figure(plt, grids, task)
        if drawn is None and plt is not None and any(grids.values()):
            page.say("Nobody found a key at any length and depth.")
        page.figure(task, drawn, f"{task}: accuracy in % by length and depth, a panel for each model")


def states_section(page: Page, plt: Any, records: Records) -> None:
    """How states grow from the training length to the end, and what their heads keep."""
    rows = []
    for model, items in records.items():
        for r in items:
            x = r["result"]
            ratios = sorted(g["variance_ratio"] for g in x["growth"])
            inside = [s for s in x["snapshots"] if s["position"] <= x["train_length"]] or x["snapshots"][:1]
            ends = [inside[-1], x["snapshots"][-1]]
            top = [mean([v for s in end["states"] for v in s["top"]]) for end in ends]
            remembering = mean([k["kept_half_T"] for k in x["retention"]])
            growth = [ratios[len(ratios) // 2], ratios[-1]] if ratios else [None, None]
            over = [sum(v > 2 for v in ratios), len(ratios)]
            rows.append([model, x["prompt"], x["length"], *growth, *over, *top, remembering])
    page.table("model,prompt,length,median growth,largest growth,heads over 2,heads,top 1 % at T,top 1 % at end,kept".split(","), rows)
    rules = []
    for model, items in records.items():
        for r in items:
            for k in r["result"]["retention"]:
                if e := k.get("eigenvalues"):
                    of = "a" if k["name"] == "delta" else "1 - b"
                    rules.append(
                        [
                            model,
                            r["result"]["prompt"],
                            k["layer"],
                            of,
                            min(e["lowest"]),
                            mean(e["mean"]),
                            max(e["highest"]),
                            mean(e["negative"]),
                        ]
                    )
    page.table("model,prompt,layer,eigenvalue,lowest,mean,highest,below zero".split(","), rules)
    for model, items in records.items():
        for r in items:
            name = f"states-{r['result']['prompt']}-{model}"
            caption = f"{model}, {r['result']['prompt']}: standard deviation of each layer's state, effective rank of matrices, and growth by head"
            page.figure(name, states_figure(plt, r["result"], model), caption)


def remembrance_section(page: Page, plt: Any, records: Records) -> None:
    """How far the prediction changes when the first tokens are dropped."""
    curves = [(model, r["result"]) for model, items in records.items() for r in items]
    page.figure("remembrance", remembrance_figure(plt, curves), "Effective remembrance, 95 % intervals")


def cures_section(page: Page, plt: Any, records: Records) -> None:
    """The position curve under each cure beside that without one."""
    rows = []
    for model, items in records.items():
        items = sorted(items, key=lambda r: (r["result"]["cure"] != "none", r["result"]["cure"]))
        base: dict[str, Any] = next((r["result"]["collapse"] for r in items if r["result"]["cure"] == "none"), {})
        for r in items:
            x, c = r["result"], r["result"]["collapse"]
            change = c["level_inside"] - base["level_inside"] if "level_inside" in c and "level_inside" in base else None
            end = x["buckets"][-1]["nats_per_token"]
            rows.append([model, x["cure"], c.get("level_inside"), change, end, c.get("delta_at_end"), c.get("verdict")])
        curves = [
            (r["result"]["cure"], r["result"]["buckets"], r["settings"].get("T") if r["result"]["cure"] == "none" else None) for r in items
        ]
        page.figure(f"cures-{model}", curves_figure(plt, curves, f"{model}: cures"), f"{model}: loss by position under each cure")
        rises = [(r["result"]["cure"], r["result"]["buckets"], r["result"]["collapse"]) for r in items]
        page.figure(
            f"cures-rise-{model}",
            rise_figure(plt, rises, f"{model}: cures, rise beyond T"),
            f"{model}: rise beyond the training length under each cure",
        )
    page.table("model,cure,inside,change inside,end,delta at end,verdict".split(","), rows)


def harness_section(page: Page, plt: Any, records: Records) -> None:
    """The harness's own figures."""
    rows = []
    for model, items in records.items():
        for r in items:
            for key, value in r["result"]["figures"].items():
                metric, _, kind = key.partition(",")
                if kind and "stderr" not in metric:
                    error = r["result"]["figures"].get(f"{metric}_stderr,{kind}")
                    rows.append([model, r["result"]["task"], metric, value, error, r["result"]["samples"]])
    page.table(["model", "task", "metric", "value", "standard error", "documents"], rows)


def extra_section(page: Page, plt: Any, records: Records) -> None:
    """What each measurement says of itself in a line."""
    page.table(["model", "measurement", "result"], [[m, r["item"], r["result"]["summary"]] for m, items in records.items() for r in items])


# (kind of the items, heading, what its figures mean, what draws them), in the report's order.
SECTIONS: list[tuple[str, str, str, Callable[[Page, Any, Records], None]]] = [
    (
        "documents",
        "Documents",
        "Each document from its own beginning, or piece by piece where there are few. Held out: passages of the text were looked for in the training data. Bits per byte can be compared between models with different tokenizers where the text is the same; perplexity cannot.",
        documents_section,
    ),
    (
        "position",
        "Loss by position",
        "delta: nats of a bucket beyond the training length T minus those of the same tokens in windows of T that start afresh (of constant tokens: minus the mean over "
        "[T/2, T]). Onset: first of up to four successive buckets whose delta exceeds 0.1 or 0.5 nat. 2x: the published test, no bucket beyond T above twice the largest loss inside it (the first bucket left out).",
        position_section,
    ),
    (
        "states",
        "Recurrent states",
        "Growth: variance of a head's state at the end over that at the training length T. top 1 %: share of the sum of squares in the largest "
        "1 % of entries, mean over heads. Kept: share of heads (channels) that keep over half of the first token at T.",
        states_section,
    ),
    (
        "remembrance",
        "Effective remembrance",
        "Total variation distance of the next-token distributions with the whole text and with its first t tokens dropped; near 1 at small t: spoilt by its first tokens.",
        remembrance_section,
    ),
    (
        "cure",
        "Cures",
        "inside: mean loss over [T/2, T], and its change against none; end: loss of the last bucket. Same rows for all. Formulas and sources: evals/cures.",
        cures_section,
    ),
    (
        "retrieval",
        "Retrieval",
        "Accuracy in % (95 % Wilson interval) over all depths: exact match of the key for passkey and niah, recall of the answers for vt, cwe and fwe. Chance: a guess "
        "without reading. Best copier: the largest score, at any of the lengths, of a program that copies as many tokens of the text as a model may write, from its "
        "beginning, its end or anywhere, or that names any of the keys.",
        retrieval_section,
    ),
    (
        "tracking",
        "State tracking and recall",
        "Accuracy in % over all answers of the generated task the model was trained on (95 % interval over sequences), by length; chance is the share of the commonest answer.",
        tracking_section,
    ),
    ("extra", "More measurements", "Suites of one measurement each: evals/suites/extra says what they are.", extra_section),
    (
        "harness",
        "lm-evaluation-harness",
        "",
        harness_section,
    ),
]


def draw_sections(page: Page, plt: Any, records: Records, otherwise: str = "") -> None:
    """Every section of what was measured. otherwise: what is said of figures that explain themselves. Results that cannot be drawn, as those of another
    version, do not keep the others from it: they are named at the end."""
    lost: list[list[str]] = []
    for kind, title, meaning, draw in SECTIONS:
        if measured := done(records, kind):
            page.head(title)
            if meaning or otherwise:
                page.say(meaning or otherwise)
            lost += drawn(page, plt, draw, measured)
    if lost:
        page.head("Not drawn")
        page.table(["model", "item", "why"], lost)


def drawn(page: Page, plt: Any, draw: Callable[[Page, Any, Records], None], records: Records) -> list[list[str]]:
    """Draws a section of all records, or of those that can be drawn; a table's rows about the others."""
    whole, lost, good = Page(), list[list[str]](), Records()
    try:
        draw(whole, plt, records)
    except Exception:
        whole = Page()
        for model, record in ((model, record) for model, items in records.items() for record in items):
            more, page_of_more = {**good, model: [*good.get(model, []), record]}, Page()
            try:  # beside those before it: each alone may be drawn where the two together cannot
                draw(page_of_more, plt, more)
                good, whole = more, page_of_more
            except Exception as error:
                why = f"its JSON is of another version or was changed ({type(error).__name__}: {error}); redo=true measures it again"
                lost.append([model, record["item"], why])
    page.parts += whole.parts
    return lost


def failures(page: Page, records: Records) -> None:
    """What could not be measured, and why."""
    rows = [[m, r["item"], r["reason"]] for m, items in records.items() for r in items if r["status"] != "done"]
    if rows:
        page.head("Not measured")
        page.table(["model", "item", "why"], rows)


def write_report(out: Path) -> Page:
    """Writes report.md, plots/*.png and report.html under `out`, from the records there; returns the page."""
    records, plt, page = read(out), pyplot(), Page()
    rows = []
    for model, items in records.items():
        d, e = items[0]["model"], items[0]["environment"]
        about = [d.get(key) for key in ("kind", "parameters", "train_length", "carry", "precision")]
        rows.append([model, *about, e.get("device"), e.get("torch"), str(e.get("commit", ""))[:12], len(items)])
    page.table("model,kind,parameters,training length,state carried in,precision,device,torch,commit,items".split(","), rows)
    if plt is None:
        page.say("There are no plots: matplotlib is not installed (pip install matplotlib, then python -m evals.report OUT).")
    texts(page, records)
    draw_sections(page, plt, records)
    failures(page, records)
    for name, png in page.figures().items():
        write_bytes(out / "plots" / f"{name}.png", png)
    write_bytes(out / "report.md", page.markdown().encode())
    write_bytes(out / "report.html", page.html().encode())
    return page


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""

    def run(words: list[str]) -> None:
        if len(words) != 1:
            raise UserError(f"Give one folder of measurements, that `python -m evals.run suite=...` wrote, not {len(words)} words.")
        if not Path(words[0]).is_dir() or not read(Path(words[0])):
            raise UserError(f"{words[0]} is no folder of measurements; give one that `python -m evals.run suite=...` wrote.")
        write_report(Path(words[0]))

    return program(__doc__, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
