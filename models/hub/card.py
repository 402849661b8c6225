"""The model card (README.md) of an exported folder: only what the checkpoint, its run's logs and the evaluations that are given say.

Hugging Face's ModelCard fills the template below and writes the header; the loss over training is plotted into plots/, beside the plots of the
evaluation.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from data.files import write_bytes
from models.config import ModelConfig

TEMPLATE = """---
{{ card_data }}
---
{% macro table(rows) %}
|  |  |
|---|---|
{% for row in rows -%}
| {{ row | map("replace", "|", "\\\\|") | join(" | ") }} |
{% endfor %}
{%- endmacro -%}
# {{ title }}

A language model of {{ "{:,}".format(parameters) }} parameters, loaded by transformers as `{{ architecture }}`.

## Architecture
{{ table(layers) }}
## Use

```python
{% if reads -%}
from transformers import AutoModelForCausalLM, AutoTokenizer
{%- else -%}
import torch
from transformers import AutoModelForCausalLM
{%- endif %}

folder = "."  # or the name of this repository
{% if reads -%}
tokenizer = AutoTokenizer.from_pretrained(folder{{ trust }})
{% endif -%}
model = AutoModelForCausalLM.from_pretrained(folder{{ trust }})
{% if reads -%}
inputs = tokenizer({{ "tokenizer.bos_token + " if begins }}"The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
{%- else -%}
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=50)[0])
{%- endif %}
```
{% if begins %}
Every training document began with `bos_token`, which the tokenizer does not add by itself; start prompts with it.
{% endif -%}
{% if trust %}
The code is in this folder and needs torch and transformers; on a GPU it uses Triton where that is installed.
{% endif -%}
{% if training %}
## Training
{{ table(training) }}
{% if loss -%}
![training loss by step](plots/loss.png)
{% endif -%}
{% endif -%}
{% if evaluation %}
{{ evaluation }}
{% endif %}
## Limits

{% if imported -%}
The weights were imported; what they were trained on, and for what, is not recorded here.
{%- else -%}
A base model: not tuned to follow instructions, not filtered, and likely to state what is false.
{%- endif %}
{% if length %}
It was trained on sequences of {{ length }} tokens; what it does beyond them must be measured (`python -m evals.run suite=long_context`).
{% endif %}
The full model and training configuration is in `everywhen.json`.

## Licence

{{ licence }}
"""


@dataclass
class Evaluation:
    """What was measured of a model, for its card: Markdown that begins with its heading, and the PNGs that it shows as plots/NAME.png."""

    markdown: str
    plots: dict[str, bytes] = field(default_factory=dict)


def read_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def layer_rows(config: ModelConfig) -> Iterator[list[str]]:
    """What the model is made of: (name, value) rows."""
    used = [config.mixers[config.mixer_name(i)] for i in range(min(config.n_layers, len(config.pattern)))]
    pattern = ", ".join(m["type"] + (f" ({m.get('cell', 'paragru')})" if m["type"] == "rnn" else "") for m in used)
    yield ["layers", f"{config.n_layers}, repeating: {pattern}"]
    yield ["width", f"{config.d_model}, MLP {config.mlp_width or 'none'}"]
    yield ["vocabulary", f"{config.vocab_size}{', embeddings tied' if config.tie_embeddings else ''}"]
    for name in dict.fromkeys(config.mixer_name(i) for i in range(config.n_layers)):
        settings = ", ".join(f"{key} {value}" for key, value in config.mixers[name].items() if key != "type")
        yield [f"`{name}`", settings or "defaults"]


def training_rows(run: dict[str, Any], state: dict[str, Any]) -> Iterator[list[str]]:
    """Data, tokens and settings of the run: (name, value) rows, none where nothing is known."""
    train, optim, schedule = (run.get(key) or {} for key in ("train", "optim", "schedule"))
    if data := (run.get("data") or {}).get("path"):
        listed = data if isinstance(data, dict) else {data: None}
        yield ["data", ", ".join(Path(str(f)).name + (f" ({share})" if share else "") for f, share in listed.items())]
    if "tokens" in state:
        yield ["tokens", f"{state['tokens']:,} in {state.get('step', 0):,} steps"]
    if train:
        yield ["batch", f"{train.get('global_batch')} sequences of {train.get('seq_len')} tokens, {train.get('precision')}"]
    if optim:
        yield ["optimizer", ", ".join(f"{key} {value}" for key, value in optim.items())]
    if schedule:
        yield ["schedule", ", ".join(f"{key} {value}" for key, value in schedule.items())]
    if "seed" in run:
        yield ["seed", str(run["seed"])]


def loss_plot(log: Path, last: int) -> bytes | None:
    """A PNG of the loss that metrics.jsonl holds up to the step `last`; None where it holds less than two, or without matplotlib."""
    try:
        from matplotlib.figure import Figure

        rows = [json.loads(line) for line in log.read_text().splitlines()]
    except (ImportError, OSError, ValueError):
        return None
    points = [(r["step"], r["loss"]) for r in rows if is_number(r.get("loss")) and r["step"] <= last]
    if len(points) < 2:
        return None
    figure = Figure(figsize=(9, 4.5))
    axes = figure.subplots()
    axes.plot(*zip(*points))
    axes.set(xlabel="optimizer step", ylabel="nats per token", title="training loss")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def write_card(
    source: Path,
    out: Path,
    config: ModelConfig,
    architecture: str,
    facts: dict[str, Any],
    parameters: int,
    licence: str,
    evaluation: Evaluation | None = None,
) -> None:
    """README.md and plots/*.png in `out`. facts: run.json and state.json of the checkpoint `source`, by their names without the ending."""
    run, state = facts.get("run", {}), facts.get("state", {})
    training = list(training_rows(run, state))
    plots = dict(evaluation.plots) if evaluation is not None else {}
    if training and (loss := loss_plot(source.parent.parent / "metrics.jsonl", int(state.get("step", 0)))):
        plots["loss"] = loss
    imported = (source / "imported.json").exists()  # trained elsewhere, we do not know how
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", license=licence, tags=["everywhen"]),
        template_str=TEMPLATE,
        title=run.get("name") or source.name,
        parameters=parameters,
        architecture=architecture,
        layers=list(layer_rows(config)),
        trust=", trust_remote_code=True" if architecture.startswith("Everywhen") else "",
        reads=(out / "tokenizer.json").exists(),
        begins="bos_token" in read_or_empty(out / "tokenizer_config.json") and not imported,
        training=training,
        loss="loss" in plots,
        evaluation=evaluation.markdown.strip() if evaluation is not None else "",
        imported=imported,
        length=(run.get("train") or {}).get("seq_len"),
        licence=licence,
    )
    write_bytes(out / "README.md", card.content.encode())
    for name, png in plots.items():
        write_bytes(out / "plots" / f"{name}.png", png)
