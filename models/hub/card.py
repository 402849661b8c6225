"""The model card (README.md) of an exported folder: only what the checkpoint and the JSON beside it say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.config import ModelConfig


def _evaluations(source: Path) -> list[tuple[str, str, float]]:
    """(file, key, number) of the evaluation JSON in the checkpoint folder and its run folder."""
    rows = []
    for folder in (source, source.parent.parent):
        for path in sorted(folder.glob("eval*.json")):
            try:
                value = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if isinstance(value, dict):
                rows += [(path.name, str(k), float(v)) for k, v in value.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return rows


def model_card(source: Path, config: ModelConfig, architecture: str, facts: dict[str, Any], parameters: int, licence: str) -> str:
    """The text of README.md."""
    run, state = facts.get("run", {}), facts.get("state", {})
    name = str(run.get("name") or source.name)
    mixers = [config.mixers[config.mixer_name(i)] for i in range(min(config.n_layers, len(config.pattern)))]
    pattern = ", ".join(m["type"] + (f" ({m.get('cell', 'paragru')})" if m["type"] == "rnn" else "") for m in mixers)
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"license: {licence}", "tags:", "- everywhen", "---", f"# {name}", ""]
    lines += [
        f"A language model of {parameters:,} parameters, loaded by transformers as `{architecture}`.",
        "",
        "| | |",
        "|---|---|",
        f"| layers | {config.n_layers}, repeating: {pattern} |",
        f"| width | {config.d_model}, MLP {config.mlp_width or 'none'} |",
        f"| vocabulary | {config.vocab_size}{', embeddings tied' if config.tie_embeddings else ''} |",
    ]
    if "tokens" in state:
        lines.append(f"| trained on | {state['tokens']:,} tokens in {state.get('step', 0):,} steps |")
    if data := (run.get("data") or {}).get("path"):
        listed = data if isinstance(data, dict) else {data: None}
        lines.append(f"| data | {', '.join(Path(str(folder)).name for folder in listed)} |")
    if length := (run.get("train") or {}).get("seq_len"):
        lines.append(f"| training length | {length} tokens |")
    lines += ["", "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    code = ", trust_remote_code=True" if architecture.startswith("Everywhen") else ""
    lines += ['folder = "."  # or the name of this repository', f"tokenizer = AutoTokenizer.from_pretrained(folder{code})"]
    lines += [f"model = AutoModelForCausalLM.from_pretrained(folder{code})"]
    lines += ['inputs = tokenizer(tokenizer.bos_token + "The ", return_tensors="pt")', "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))", "```", ""]
    lines += ["Every training document began with the end-of-text token; start prompts with it.", ""]
    rows = _evaluations(source)
    if rows:
        lines += ["## Evaluation", "", "| file | number | |", "|---|---|---|", *(f"| {f} | {k} | {v:.6g} |" for f, k, v in rows), ""]
    lines += ["## Limits", "", "A base model: not tuned to follow instructions, not filtered, and likely to state what is false."]
    lines += ["The full model and training configuration is in `everywhen.json`.", "", "## Licence", "", licence, ""]
    return "\n".join(lines)
