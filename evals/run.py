"""Evaluates checkpoints.

    python -m evals.run checkpoint=runs/quickstart suite=perplexity [data=DIR] [length=2048] [chunk=512] [batch=8] [max_tokens=N] [device=auto] [precision=fp32] [out=FILE]
    python -m evals.run checkpoint=DIR[,DIR...] suite=perplexity|quick|long_context|state_tracking|harness|all|(a file of evals/suites/extra) [out=runs/evals] [train_length=T] [max_length=N]
        [lengths=512,1024] [depths=5] [samples=20] [sequences=1000] [rows=16] [chunk=2048] [batch=8] [seed=0] [data=DIR] [text=FILE] [cures=default|none|NAME,NAME] [tasks=NAME,FILE.yaml]
        [only=PART-OF-AN-ITEM] [redo=true] [gguf=FILE-NAME] [trust_remote_code=true] [add_bos_token=auto|true|false] [device=auto] [precision=fp32]

`checkpoint` is a run folder, a checkpoint of it, or a folder with model.safetensors, config.json and tokenizer.json; for the suites of the
second line also any Hugging Face causal language model on disk (code that it brings is run with trust_remote_code=true only). A model trained on
a generated task is scored on that task by every suite. perplexity of one checkpoint scores the held-out split with documents reset at their starts;
its result is printed and written as JSON (default: eval-perplexity.json beside the weights, or under runs/evals where these cannot be written to).
With text=FILE or several checkpoints it is a suite like the others: documents of the text, and the loss by position (to `length` tokens).
Suites measure all models on one text: text=FILE (what data.prepare reads), the held-out split of data=DIR, else that of the first run, else
the bundled books; and say which of them was trained on it. They write OUT/MODEL/items/*.json, one after each measurement, and OUT/report.html and report.md of everything under OUT; the
same command goes on where it was stopped. Under torchrun the items are shared out over the GPUs. See docs/long_context.md.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

from evals.progress import Progress
from evals.suites import extra
from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "suite": "perplexity",
    "data": None,
    "length": 2048,
    "chunk": 512,
    "batch": 8,
    "max_tokens": int,
    "device": "auto",
    "precision": "fp32",
    "out": None,
    "seed": 0,
    "train_length": int,
    "max_length": int,
    "lengths": [],
    "depths": 5,
    "samples": int,
    "sequences": int,
    "rows": int,
    "cures": "default",
    "tasks": "",
    "text": None,
    "only": "",
    "redo": False,
    "gguf": None,
    "trust_remote_code": False,
    "add_bos_token": "auto",
}
BY_TOKENS = ("checkpoint", "suite", "data", "length", "chunk", "batch", "max_tokens", "device", "precision", "out")
SUITES = ("perplexity", "quick", "long_context", "harness", "all", "state_tracking", *extra.available())


def problems_of(values: dict[str, Any]) -> list[str]:
    """What cannot be run, a sentence each."""
    problems = []
    if not values["checkpoint"]:
        problems.append("Say what to evaluate: checkpoint=DIR.")
    if values["suite"] not in SUITES:
        problems.append(f"suite is {values['suite']!r}; choose one of {', '.join(SUITES)}.")
    if values["precision"] not in ("fp32", "bf16"):
        problems.append(f"precision is {values['precision']!r}; choose fp32 or bf16.")
    if values["add_bos_token"] not in ("auto", "true", "false"):
        problems.append(f"add_bos_token is {values['add_bos_token']!r}; choose auto (as the tokenizer says), true or false.")
    if values["text"] is not None and values["data"] is not None:
        problems.append("text and data both say what to read; give one of them.")
    return problems


def by_tokens(values: dict[str, Any]) -> bool:
    """Whether `run` scores token shards as they are (perplexity of one checkpoint); a text, or several models, are compared by suites."""
    alone = "," not in (values["checkpoint"] or "") or Path(values["checkpoint"]).exists()
    return bool(values["suite"] == "perplexity" and values["text"] is None and alone)


def without_meaning(values: dict[str, Any]) -> list[str]:
    """The keys that were given and do not count in what is asked for."""
    given = [key for key, value in values.items() if value != (None if DEFAULTS[key] is int else DEFAULTS[key])]
    if by_tokens(values):
        return [key for key in given if key not in BY_TOKENS]
    return [key for key in given if key == "max_tokens" or key == "length" and values["suite"] != "perplexity"]


def run_suite(values: dict[str, Any]) -> int:
    """Runs a suite on every checkpoint; returns 1 where none of its items could be measured, else 0. Raises UserError where nothing can be run."""
    from evals.suites.runner import evaluate
    from evals.suites.subject import Settings

    settings = Settings(**{f.name: values[f.name] for f in dataclasses.fields(Settings)})
    if settings.suite == "perplexity":
        settings.max_length = settings.max_length or values["length"]
    named = values["checkpoint"]
    paths = [named] if Path(named).exists() else [path for path in named.split(",") if path]
    return evaluate(
        paths,
        settings,
        Path(values["out"] or "runs/evals"),
        values["device"],
        values["precision"],
        values["gguf"],
        values["trust_remote_code"],
    )


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Scores one checkpoint on the held-out split of token shards: writes the result as JSON, prints and returns it. Raises UserError."""
    from evals.adapters.load import device_of
    from models.checkpoint import load_model

    model, tokenizer, meta = load_model(values["checkpoint"], device_of(values["device"]))
    folder = values["data"] or meta.get("run", {}).get("data", {}).get("path")
    if isinstance(folder, str) and "," in folder and not Path(folder).exists():
        folder = dict.fromkeys(folder.split(","), 1.0)
    if isinstance(folder, dict) and folder:
        return run_mixture(values, {str(name): float(weight) for name, weight in folder.items()}, model, tokenizer, meta)
    if not isinstance(folder, str):
        raise UserError("Say which token shards to score: data=DIR.")
    splits = open_splits(folder, tokenizer, Path(meta["folder"]))
    out = where_to_write(values, Path(meta["folder"]))
    report = score(values, folder, splits, model, meta)
    _keep(report, out)
    return report


def score(values: dict[str, Any], folder: str, splits: tuple[Any, Any], model: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """The result on the held-out split of one folder of shards. splits: what `open_splits` gives. Raises UserError where nothing can be scored."""
    from evals.adapters.base import not_finite
    from evals.measures.baselines import baselines
    from evals.measures.perplexity import evaluate
    from models.prompt import prompt_of
    from training.watch.metrics import environment

    held_out, train = splits
    exposure = what_is_known(meta, held_out)
    start = time.perf_counter()
    with Progress("perplexity", "rows", every=True) as progress:
        result = evaluate(
            model,
            held_out,
            length=values["length"],
            chunk=values["chunk"],
            batch=values["batch"],
            max_tokens=values["max_tokens"],
            precision=values["precision"],
            on_progress=progress,
        )
    if not math.isfinite(result.nll_nats):
        raise UserError(not_finite(values["precision"]))
    if not result.tokens:
        raise UserError(
            f"All of the held-out text of {folder} lies in prompts that this model sees whole, so nothing of it can be scored; prepare more."
        )
    seconds = time.perf_counter() - start
    counted = baselines(train, held_out, values["length"], values["max_tokens"], prompt_of(model))
    return {
        "suite": values["suite"],
        "arguments": {**values, "data": folder},
        "checkpoint": meta["folder"],
        "step": meta.get("state", {}).get("step"),
        **result.to_dict(),
        "text": {"name": f"the valid split of {folder}", "fingerprint": held_out.fingerprint},
        "seen": exposure.to_dict(),
        "baselines_bits_per_byte": {name: part.bits_per_byte for name, part in counted.items()},
        "seconds": seconds,
        "tokens_per_second": result.tokens / seconds,
        "environment": environment(model.embedding.weight.device),
    }


def open_splits(folder: str, tokenizer: Any, checkpoint: Path) -> tuple[Any, Any]:
    """(held-out split, training split) of token shards. Raises UserError where they cannot be read, or are not in the checkpoint's own tokens."""
    from data.shards import ShardSet
    from data.tokenizer import marks_of

    held_out, train = ShardSet(folder, "valid"), ShardSet(folder, "train")
    if held_out.tokenizer().to_str() != tokenizer.to_str():
        raise UserError(
            f"The shards in {folder} were made with another tokenizer than this checkpoint's; prepare the text with {checkpoint}/tokenizer.json."
        )
    if (begins := marks_of(tokenizer, checkpoint).start) != held_out.eot_id:
        raise UserError(
            f"Documents of {folder} begin with the token {tokenizer.id_to_token(held_out.eot_id)!r}, those of this checkpoint with "
            f"{'none' if begins is None else repr(tokenizer.id_to_token(begins))}; prepare the text with tokenizer={checkpoint}."
        )
    return held_out, train


def what_is_known(meta: dict[str, Any], held_out: Any) -> Any:
    """Whether the checkpoint was trained on these shards' held-out split (evals.inputs.seen)."""
    from evals.inputs.seen import facts_of_run, seen
    from evals.inputs.texts import corpus_of_shards

    return seen(corpus_of_shards(str(held_out.directory)).documents, facts_of_run(meta["folder"]))


def where_to_write(values: dict[str, Any], folder: Path) -> Path:
    """The file of the result: what was asked for, else beside the weights, else under runs/evals. Raises UserError before anything is measured
    where none of them can be written."""
    from data.files import check_writable

    name = f"eval-{values['suite']}.json"
    if values["out"]:
        out = Path(values["out"])
        out = out / name if out.is_dir() else out
        if out.suffix != ".json" and out.exists():
            raise UserError(f"out={values['out']} exists and is no JSON, so it is not written over; give FILE.json or a folder.")
        check_writable(out.parent)
        return out
    try:
        check_writable(folder)
        return folder / name
    except UserError:
        parts = [part for part in folder.resolve().parts if part not in ("checkpoints", "/")]
        other = Path("runs/evals") / "-".join(parts[-2:] if parts[-1].startswith("step-") else parts[-1:])
        check_writable(other)
        print(f"{folder} cannot be written to; the result goes to {other / name}.", flush=True)
        return other / name


def run_mixture(values: dict[str, Any], folders: dict[str, float], model: Any, tokenizer: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """Scores every source of a mixture by itself, and all of them by their weights. folders: weight by folder of shards.

    The figures of the mixture are those of its tokens if each source gave its share of them. Those of a source have a file of their own where out=
    names one. Raises UserError where no source can be scored, and before anything is measured where one cannot be read.
    """
    from data.shards import open_held_out
    from evals.measures import mixture

    scored = [folder for folder in folders if open_held_out(folder) is not None]
    if left := [folder for folder in folders if folder not in scored]:
        print(f"{', '.join(left)} has no held-out documents and is not evaluated; prepare it with valid_fraction above zero.")
    if not scored:
        raise UserError("No source of this mixture has held-out documents; prepare one with valid_fraction above zero, or give data=DIR.")
    splits = [open_splits(folder, tokenizer, Path(meta["folder"])) for folder in scored]
    out = where_to_write(values, Path(meta["folder"]))
    total_weight = sum(folders[folder] for folder in scored)
    reports: dict[str, dict[str, Any]] = {}
    parts = []
    for name, folder, opened in zip(mixture.names_of(scored), scored, splits):
        print(f"source {name}")
        report = score(values, folder, opened, model, meta)
        _keep(report, out.with_name(f"{out.stem}-{len(reports)}{out.suffix}") if values["out"] else None)
        reports[name] = report
        parts.append((mixture.of_report(report), folders[folder] / total_weight if total_weight else 1 / len(scored)))
    total, first = mixture.combined(parts), next(iter(reports.values()))
    sources = {name: mixture.figures(part, share) for name, (part, share) in zip(reports, parts)}
    seconds = sum(one["seconds"] for one in reports.values())
    report = {**first, "arguments": {**values, "data": folders}, **total.to_dict(), "sources": sources}
    report |= {"seconds": seconds, "tokens_per_second": total.tokens / seconds}
    statuses = sorted({one["seen"]["status"] for one in reports.values()})
    report["text"] = {"name": " and ".join(one["text"]["name"] for one in reports.values())}
    report["seen"] = {
        "status": statuses[0]
        if len(statuses) == 1
        else "by source: " + ", ".join(f"{name} {one['seen']['status']}" for name, one in reports.items())
    }
    bases = [one["baselines_bits_per_byte"] for one in reports.values()]
    sizes = [share * part.bytes / part.tokens for part, share in parts]  # bytes of each source in a token of the mixture
    report["baselines_bits_per_byte"] = {n: sum(b[n] * size for b, size in zip(bases, sizes)) / sum(sizes) for n in bases[0]}
    print(f"the mixture, {'each source alike' if values['data'] else 'weighed as in training'}: {mixture.by_source(sources)}")
    _keep(report, out)
    return report


def _keep(report: dict[str, Any], out: Path | None) -> None:
    """Writes a result to `out`, unless that is None, and shows it."""
    from data.files import save_report

    if out is not None:
        save_report(out, report)
    _show(report, out)


def _show(report: dict[str, Any], out: Path | None) -> None:
    base = report["baselines_bits_per_byte"]
    print(
        f"{report['checkpoint']}: {report['bits_per_byte']:.4f} bits per byte, perplexity {report['perplexity']:.2f} over {report['tokens']:,} tokens of "
        f"{report['text']['name']} ({report['seen']['status']})"
    )
    print(f"counted from the same training tokens: unigram {base['unigram']:.4f}, bigram {base['bigram']:.4f} bits per byte")
    print("  position        nats/token   tokens")
    for row in report["by_position"]:
        places = f"{row['from']}-{row['to']}" if row["to"] > row["from"] else f"{row['from']}"
        print(f"  {places:<15}{row['nats_per_token']:>10.4f} {row['tokens']:>8}")
    if out is not None:
        print(f"written to {out}")


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, _main, arguments)


def _main(words: list[str]) -> int:
    values = parse_arguments(words, DEFAULTS, problems_of)
    if unread := without_meaning(values):
        way = "perplexity of one checkpoint on token shards" if by_tokens(values) else f"suite={values['suite']}"
        print(f"note: {way} does not look at {', '.join(unread)}.", file=sys.stderr)
    if by_tokens(values):
        run(values)
        return 0
    else:
        if not any(word.startswith("chunk=") for word in words):
            values["chunk"] = 2048
        return run_suite(values)


if __name__ == "__main__":
    sys.exit(main())
