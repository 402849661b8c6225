"""Loads exported folders as a stranger would, with transformers alone, and writes down what they compute. Run by file name in a fresh process:

    python -I models/hub/check_folder.py JOB.json

JOB.json: {"folders": [{"folder", "ids" (rows of token ids), "new_tokens", "out"}]}. Each `out` receives logits in fp32 and bf16, the greedy
continuation of the first row; beside it, as JSON, the class, config and what AutoTokenizer makes of `sample`. The project itself cannot be imported here, which is checked.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HIDDEN = ("models", "kernels", "training", "data", "evals", "train")


class Hide:
    """A finder of modules that does not find the project's packages (raising instead would break those who only ask whether there is one)."""

    def __init__(self, finder: Any) -> None:
        self.finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def look(job: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, ids = job["folder"], torch.tensor(job["ids"])
    report: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()
        with torch.no_grad():
            tensors[name] = model(input_ids=ids).logits.float().contiguous()
        if name == "fp32":
            report["class"] = type(model).__name__
            report["config"] = model.config.to_dict()
            report["parameters"] = sum(p.numel() for p in model.parameters())
            model.generation_config = GenerationConfig()  # the folder's own may ask for penalties and other choices of tokens
            text = model.generate(
                ids[:1],
                attention_mask=torch.ones_like(ids[:1]),
                do_sample=False,
                max_new_tokens=job["new_tokens"],
                min_new_tokens=job["new_tokens"],
                eos_token_id=None,
            )
            tensors["greedy"] = text[:, ids.shape[1] :].contiguous()
            if job.get("ways"):
                report["ways"] = ways(model, ids) if report["class"].startswith("Everywhen") else {}
                whole = model
    if (Path(folder) / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        coded = tokenizer(job["sample"], add_special_tokens=False).input_ids
        report["tokenizer"] = {"ids": coded, "text": tokenizer.decode(coded), "eos": tokenizer.eos_token_id}
        if job.get("ways"):
            report["ways"] |= as_text(whole, tokenizer, folder)
    save_file(tensors, job["out"])
    Path(job["out"] + ".json").write_text(json.dumps(report, default=str))


def ways(model: Any, ids: Any) -> dict[str, bool]:
    """Whether other ways of generating with the project's own cache give what they should."""
    import torch

    def text(rows: Any, mask: Any = None, **options: Any) -> Any:
        options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "eos_token_id": None, **options}
        return model.generate(rows, attention_mask=torch.ones_like(rows) if mask is None else mask, **options)[:, rows.shape[1] :]

    first, unpadded = ids[:1], ids[:1, 5:]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = torch.cat([ids[:1] * mask[:1], ids[1:]])
    return {
        "uncached": torch.equal(text(first), text(first, use_cache=False)),
        "beams": torch.equal(text(first, num_beams=3), text(first, num_beams=3, use_cache=False)),
        "padding": torch.equal(text(padded, mask), torch.cat([text(unpadded), text(ids[1:])])),
        "assisted": torch.equal(text(first, assistant_model=model), text(first)),
        "lookup": torch.equal(text(torch.cat([first, first], 1), prompt_lookup_num_tokens=3), text(torch.cat([first, first], 1))),
    }


def as_text(model: Any, tokenizer: Any, folder: str) -> dict[str, bool]:
    """Whether the pipeline and a streamer give the text that generate does."""
    from transformers import TextStreamer, pipeline

    class Kept(TextStreamer):
        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text

    prompt, options = "The end", {"do_sample": False, "max_new_tokens": 9, "eos_token_id": tokenizer.eos_token_id}
    inputs = tokenizer(prompt, return_tensors="pt")
    plain = tokenizer.decode(model.generate(**inputs, **options)[0], skip_special_tokens=True)
    streamer = Kept(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, **options, streamer=streamer)
    pipe = pipeline("text-generation", model=folder, tokenizer=tokenizer, trust_remote_code=True)
    return {"streamed": streamer.text == plain, "pipeline": pipe(prompt, **options)[0]["generated_text"] == plain}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
    try:
        import models  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("the project is importable in the process that should not see it")
    for job in json.loads(Path(sys.argv[1]).read_text())["folders"]:
        look(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
