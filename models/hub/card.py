"""The model card (README.md) of an exported folder: only what the checkpoint, its run's logs and the JSON of evaluations say.

Plots are drawn from the same JSON into plots/: the loss over training, the loss by position, and those of evals.run's suites.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report import sections as report
from models.config import ModelConfig

SHOWN = ("bits_per_byte", "perplexity", "nats_per_token", "tokens")  # of an evaluation of held-out text


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def architecture_section(page: report.Page, config: ModelConfig, architecture: str, parameters: int) -> None:
    mixers = [config.mixers[config.mixer_name(i)] for i in range(min(config.n_layers, len(config.pattern)))]
    pattern = ", ".join(m["type"] + (f" ({m.get('cell', 'paragru')})" if m["type"] == "rnn" else "") for m in mixers)
    page.say(f"A language model of {parameters:,} parameters, loaded by transformers as `{architecture}`.")
    page.head("Architecture")
    rows = [["layers", f"{config.n_layers}, repeating: {pattern}"], ["width", f"{config.d_model}, MLP {config.mlp_width or 'none'}"]]
    rows.append(["vocabulary", f"{config.vocab_size}{', embeddings tied' if config.tie_embeddings else ''}"])
    for name in dict.fromkeys(config.mixer_name(i) for i in range(config.n_layers)):
        settings = ", ".join(f"{key} {value}" for key, value in config.mixers[name].items() if key != "type")
        rows.append([f"`{name}`", settings or "defaults"])
    page.table(["", ""], rows)


def training_section(page: report.Page, facts: dict[str, Any], source: Path) -> None:
    """Data, tokens and settings of the run, and the loss it logged."""
    run, state = facts.get("run", {}), facts.get("state", {})
    train, optim, schedule = (run.get(key) or {} for key in ("train", "optim", "schedule"))
    rows = []
    if data := (run.get("data") or {}).get("path"):
        listed = data if isinstance(data, dict) else {data: None}
        rows.append(["data", ", ".join(Path(str(f)).name + (f" ({share})" if share else "") for f, share in listed.items())])
    if "tokens" in state:
        rows.append(["tokens", f"{state['tokens']:,} in {state.get('step', 0):,} steps"])
    if train:
        rows.append(["batch", f"{train.get('global_batch')} sequences of {train.get('seq_len')} tokens, {train.get('precision')}"])
    if optim:
        rows.append(["optimizer", ", ".join(f"{key} {value}" for key, value in optim.items())])
    if schedule:
        rows.append(["schedule", ", ".join(f"{key} {value}" for key, value in schedule.items())])
    if "seed" in run:
        rows.append(["seed", str(run["seed"])])
    if not rows:
        return
    page.head("Training")
    page.table(["", ""], rows)
    page.figure("loss", _loss_plot(source.parent.parent / "metrics.jsonl", int(state.get("step", 0))), "training loss by step")


def _loss_plot(log: Path, last: int) -> bytes | None:
    plt = report.pyplot()
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    except (OSError, ValueError):
        return None
    points = [(r["step"], r["loss"]) for r in rows if _number(r.get("loss")) and r["step"] <= last]
    if plt is None or len(points) < 2:
        return None
    figure, axes = plt.subplots(figsize=(9, 4.5))
    axes.plot(*zip(*points))
    axes.set(xlabel="optimizer step", ylabel="nats per token", title="training loss")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def evaluation_section(page: report.Page, source: Path, evals: Path | None, length: int | None) -> None:
    """Held-out text from eval*.json beside the checkpoint or in its run folder, and the suites in `evals` (OUT or OUT/MODEL of evals.run)."""
    rows: list[list[Any]] = []
    curve: list[dict[str, Any]] = []
    status = "held out"  # of the evaluations in training
    for path in [p for folder in (source, source.parent.parent) for p in sorted(folder.glob("eval*.json"))]:
        value = _read(path)
        held_out = value["perplexity"] if isinstance(value.get("perplexity"), dict) else value
        rows += [[path.name, key, held_out[key]] for key in SHOWN if _number(held_out.get(key))]
        baselines = value.get("baselines") or value.get("baselines_bits_per_byte") or {}
        rows += [
            [path.name, f"{name} counts, bits_per_byte", baselines[name]] for name in ("unigram", "bigram") if _number(baselines.get(name))
        ]
        if not curve:
            curve, status = held_out.get("by_position") or [], (value.get("seen") or {}).get("status", status)
    records = {}
    if evals is not None:
        every = report.read(evals) or report.read(evals.parent)
        records = {model: items for model, items in every.items() if model == evals.name} or every
    if not rows and not records:
        return
    page.head("Evaluation")
    page.table(["file", "number", ""], rows)
    plt = report.pyplot()
    if curve:
        page.figure("held_out", report.curves_figure(plt, [(f"text ({status})", curve, length)], "loss by position"), "loss by position")
    report.texts(page, records)
    for kind, title, meaning, draw in report.SECTIONS:
        if found := report.done(records, kind):
            page.head(title)
            page.say(meaning or "Measured by `python -m evals.run`.")
            draw(page, plt, found)


def use_section(page: report.Page, architecture: str, begins: bool, reads: bool) -> None:
    """How the folder is loaded. begins: training documents began with the end-of-text token; reads: there is a tokenizer."""
    own = architecture.startswith("Everywhen")
    code = ", trust_remote_code=True" if own else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # or the name of this repository',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{code})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{code})",
        'inputs = tokenizer(tokenizer.bos_token + "The ", return_tensors="pt")'
        if begins
        else 'inputs = tokenizer("The ", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
    ]
    if not reads:
        lines = [line for line in lines if "okenizer" not in line]
        lines[1:2] = ["import torch", "from transformers import AutoModelForCausalLM"]
        lines[-1:] = ["print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=50)[0])", "```"]
    page.head("Use")
    page.say("\n".join(lines))
    if begins:
        page.say("Every training document began with the end-of-text token; start prompts with it.")
    if own:
        page.say("The code is in this folder and needs torch and transformers; on a GPU it uses Triton where that is installed.")


def write_card(
    source: Path,
    out: Path,
    config: ModelConfig,
    architecture: str,
    facts: dict[str, Any],
    parameters: int,
    licence: str,
    evals: Path | None,
) -> None:
    """README.md and plots/*.png in `out`. evals: a folder that evals.run wrote, or None."""
    run = facts.get("run", {})
    length = (run.get("train") or {}).get("seq_len")
    page = report.Page()
    architecture_section(page, config, architecture, parameters)
    imported = (source / "imported.json").exists()  # trained elsewhere, we do not know how
    reads = (out / "tokenizer.json").exists()
    use_section(page, architecture, "bos_token" in _read(out / "tokenizer_config.json") and not imported, reads)
    training_section(page, facts, source)
    evaluation_section(page, source, evals, length)
    page.head("Limits")
    if imported:
        page.say("The weights were imported; what they were trained on, and for what, is not recorded here.")
    else:
        page.say("A base model: not tuned to follow instructions, not filtered, and likely to state what is false.")
    if length:
        page.say(
            f"It was trained on sequences of {length} tokens; what it does beyond them must be measured (`python -m evals.run suite=long_context`)."
        )
    page.say("The full model and training configuration is in `everywhen.json`.")
    page.head("Licence")
    page.say(licence)
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"license: {licence}", "tags:", "- everywhen", "---"]
    body = page.markdown().removeprefix("# Evaluation\n")
    write_bytes(out / "README.md", ("\n".join([*front, f"# {run.get('name') or source.name}", ""]) + body).encode())
    for kind, value in page.parts:
        if kind == "figure":
            write_bytes(out / "plots" / f"{value[0]}.png", value[1])
