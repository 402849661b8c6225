"""Writes a checkpoint as a Hugging Face folder that transformers loads without this project.

The folder is written under a temporary name, loaded in a fresh process by transformers alone, compared with the checkpoint (logits, greedy text,
tokenizer, config), and only then renamed. The optimizer is never read. An imported checkpoint keeps the dtypes it came with, any other is written in
fp32, unless another dtype is asked for. The command is scripts/export.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from data.errors import UserError
from data.files import new_folder, write_json
from data.tokenizer import Marks, coder_of, encode_bare, marks_of, tokenizer_config
from kernels.moved import moved
from models.checkpoint import find, read_config
from models.hub.card import Evaluation, write_card
from models.hub.custom import custom, write_code
from models.hub.importing import KEPT
from models.hub.merged import Merged, plain
from models.hub.native import Stock, stock
from models.hub.weights import DTYPES, parse_size, read_object, write_shards
from models.init import roles
from models.lm import LanguageModel

CHECKER = Path(__file__).with_name("check_folder.py")
GREEDY = 64
ATOL = 1e-4
SPELT = 40  # tokens that make a text
SAMPLE = "Say 1 thing,\n then another: naïve."


def read_imported(source: Path) -> dict[str, Any]:
    """What an import noted beside an imported checkpoint; empty for others."""
    return read_object(source / "imported.json") if (source / "imported.json").exists() else {}


def dtypes(source: Path, model: LanguageModel, dtype: str | None) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """(the dtype of most, that of each parameter) in the exported folder; recurrence parameters stay fp32. dtype None: as it was imported, else fp32."""
    imported = read_imported(source)
    if dtype is None and "dtype" in imported:
        main = getattr(torch, str(imported["dtype"]))
        others = {name: getattr(torch, kind) for name, kind in imported.get("other_dtypes", {}).items()}
    else:
        main = DTYPES[dtype or "fp32"]
        others = {name: torch.float32 for name, p in model.named_parameters() if roles(p).get("keep_fp32")}
    return main, {name: others.get(name, main) for name in model.state_dict()}


def write_folder(source: Path, out: Path, dtype: str | None, limit: int, licence: str, evaluation: Evaluation | None = None) -> Stock:
    """Everything of the export but its verification. evaluation: what the model card shows of it. Raises UserError for weights that are another model's."""
    config, weights, imported = *plain(source), read_imported(source)
    facts = {name: read_object(source / f"{name}.json") for name in ("run", "state") if (source / f"{name}.json").exists()}
    origin = origin_of(facts.get("run", {}))
    length = int((facts.get("run", {}).get("train") or {}).get("seq_len") or imported.get("max_position_embeddings") or 2048)
    if origin is not None:  # the training length does not shorten what the imported model could read
        length = max(length, int(read_object(origin / "config.json").get("max_position_embeddings") or 0))
    target = stock(config, length)[0]
    if target is None:
        target = custom(config, length)
        write_code(config, out)
    with torch.device("meta"):
        model = LanguageModel(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_embeddings:
        shapes.pop("head.weight")
    wrong = [n for n in shapes if n not in weights.where or weights.shape(n) != shapes[n]]
    if wrong:
        raise UserError(
            f"{source} does not fit its config.json: {len(wrong)} tensor(s) are missing or of another shape, the first is {wrong[0]}."
        )
    parts = target.tensors({name: shape[0] for name, shape in shapes.items()})
    main_dtype, each = dtypes(source, model, dtype)

    def get(name: str) -> Tensor:
        read = {ours: weights.tensor(ours) for ours in {ours for _, ours, _, _ in parts[name]}}
        pieces = [read[ours][first : first + rows] for _, ours, first, rows in parts[name]]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return (tensor[:, None] if name.endswith("conv1d.weight") else tensor).to(each[parts[name][0][1]])

    counts = {name: sum(rows * math.prod(shapes[ours][1:]) for _, ours, _, rows in pieces) for name, pieces in parts.items()}
    sizes = {name: each[parts[name][0][1]].itemsize * count for name, count in counts.items()}
    write_shards(out, sizes, get, limit)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json")) if (source / "tokenizer.json").exists() else None
    marks = _write_tokenizer(tokenizer, source, out, target.config.get("max_position_embeddings"), imported)
    if origin is not None and tokenizer is not None:
        _keep_template(origin, tokenizer, out)
    end = marks.start if marks.end is None else marks.end
    trained = {"bos_token_id": marks.start, "eos_token_id": end, "pad_token_id": end}
    special = {key: imported.get(key) if imported else trained[key] for key in trained}
    write_json(out / "config.json", {**target.config, **special, "dtype": str(main_dtype).removeprefix("torch.")})
    if not imported:
        write_json(out / "generation_config.json", {**special, "do_sample": True, "temperature": 0.8, "top_k": 50})
    for name in KEPT:  # an imported checkpoint's own
        if imported and (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    write_json(out / "everywhen.json", {"model": config.to_dict(), **facts})
    write_card(source, out, config, target.architecture, facts, sum(counts.values()), licence, evaluation)
    for path in out.rglob("*"):  # for everybody to read, as what a web server or another user is given
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


def origin_of(run: dict[str, Any]) -> Path | None:
    """The folder from whose weights the run started, if it is still there."""
    folder = (run.get("model") or {}).get("init_from")
    return Path(str(folder)) if folder and (Path(str(folder)) / "config.json").is_file() else None


def _keep_template(origin: Path, tokenizer: Tokenizer, out: Path) -> None:
    """The chat template of the folder that a run started from, where its tokens still are what they were."""
    if (
        not (origin / "tokenizer.json").is_file()
        or Tokenizer.from_file(str(origin / "tokenizer.json")).get_vocab() != tokenizer.get_vocab()
    ):
        return
    path, values = origin / "tokenizer_config.json", out / "tokenizer_config.json"
    template = read_object(path).get("chat_template") if path.is_file() else None
    if (origin / "chat_template.jinja").is_file():
        shutil.copyfile(origin / "chat_template.jinja", out / "chat_template.jinja")
    elif template is not None and values.is_file():
        write_json(values, {**read_object(values), "chat_template": template})


def _write_tokenizer(tokenizer: Tokenizer | None, source: Path, out: Path, limit: int | None, imported: dict[str, Any]) -> Marks:
    if tokenizer is None:
        return Marks(None)
    bare = json.loads(encode_bare(tokenizer).to_str())
    bare["post_processor"] = None  # documents were encoded without a template
    (out / "tokenizer.json").write_text(json.dumps(bare, ensure_ascii=False), encoding="utf-8")
    marks = marks_of(tokenizer, source)
    values = tokenizer_config(tokenizer, marks)
    if imported:
        ids = {key: imported.get(f"{key}_id") for key in ("bos_token", "eos_token", "pad_token")}
        values |= {
            key: tokenizer.id_to_token(id_) for key, id_ in ids.items() if isinstance(id_, int) and tokenizer.id_to_token(id_) is not None
        }
    elif marks.start is not None:
        values["pad_token"] = values["eos_token"]
    values["padding_side"] = "left"
    write_json(
        out / "tokenizer_config.json", {**values, "clean_up_tokenization_spaces": False, **({"model_max_length": limit} if limit else {})}
    )
    return marks


def sample_of(source: Path) -> str:
    """A text by which tokenizers are compared: SAMPLE, or what the tokens of one spell that cannot read it, as of sequences of letters without an
    unknown token."""
    if not (source / "tokenizer.json").is_file():
        return SAMPLE
    coder = coder_of(Tokenizer.from_file(str(source / "tokenizer.json")), source)
    for text in (SAMPLE, coder.decode(sorted(coder.tokenizer.get_vocab().values())[:SPELT])):
        with contextlib.suppress(UserError):
            coder.encode(text)
            return text
    return ""


def verify(pairs: list[tuple[Path, Path]]) -> None:
    """Compares each (checkpoint, exported folder) in one fresh process without this project. Raises UserError naming what differs."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for i, (source, folder) in enumerate(pairs):
            vocabulary = read_config(source).vocab_size
            ids = torch.randint(0, vocabulary, (2, 37), generator=torch.Generator().manual_seed(i))
            jobs.append(
                {"folder": str(folder), "ids": ids.tolist(), "new_tokens": GREEDY, "sample": sample_of(source), "out": f"{scratch}/{i}"}
            )
        Path(scratch, "job.json").write_text(json.dumps({"folders": jobs}))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        done = subprocess.run(
            [sys.executable, "-I", str(CHECKER), f"{scratch}/job.json"],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"The exported folder cannot be loaded by transformers, so nothing was written: {last}")
        for (source, _), job in zip(pairs, jobs):
            problem = _differences(source, job)
            if problem:
                raise UserError(f"The exported folder is not the model of {source}, so nothing was written: {problem}.")


@torch.no_grad()
def _differences(source: Path, job: dict[str, Any]) -> str:
    theirs, read_by_them = load_file(job["out"]), json.loads(Path(job["out"] + ".json").read_text())
    (config, weights), ids = plain(source), torch.tensor(job["ids"])
    model, written = LanguageModel(config).eval(), read_object(Path(job["folder"]) / "config.json")
    main, each = dtypes(source, model, None)
    if written["dtype"] != str(main).removeprefix("torch."):
        _, each = dtypes(source, model, next(name for name, kind in DTYPES.items() if str(kind) == f"torch.{written['dtype']}"))
    rounded = {n: weights.tensor(n).to(each[n]).float() for n in weights.names()}
    model.load_state_dict(rounded, strict=False)
    ours = model(ids).logits
    if isinstance(weights, Merged) and (gap := weights.gap(model, ids)) > ATOL:
        return f"its plain channel mixers are not the checkpoint's: logits differ by {gap:.2g}"
    worst = float((ours - theirs["fp32"]).abs().max())
    if not worst < ATOL:
        return f"its fp32 logits differ by {worst:.2g}"
    with torch.autocast("cpu", torch.bfloat16):
        rounding = float((model(ids).logits.float() - ours).abs().max())
    worst = float((theirs["bf16"] - ours).abs().max())
    if not worst <= 4 * rounding + 0.02 * float(ours.abs().max()):
        return f"its bf16 logits are off by {worst:.2g} where this project's are by {rounding:.2g}"
    state, last = model.init_state(1), ids[:1]
    for step in range(job["new_tokens"]):
        output = model(last, state=state, last_only=True)
        state = output.state
        top = output.logits[0, -1].topk(2).values
        chosen = int(theirs["greedy"][0, step])
        # A tie within rounding may fall either way; both then go on with the same token.
        if float(top[0] - output.logits[0, -1, chosen]) > ATOL:
            return f"its greedy text differs at token {step + 1}"
        last = theirs["greedy"][:, step : step + 1]
    wrong = [
        key for key, value in written.items() if key in read_by_them["config"] and key != "dtype" and read_by_them["config"][key] != value
    ]
    if wrong:
        return f"transformers reads another {wrong[0]} from its config.json"
    if "tokenizer" in read_by_them:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        if read_by_them["tokenizer"]["ids"] != coder_of(tokenizer, source).encode(job["sample"]):
            return "its tokenizer splits text differently"
    return ""


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    shard_size: str = "5GB",
    dtype: str | None = None,
    licence: str = "apache-2.0",
    evaluate: Callable[[Path], Evaluation | None] | None = None,
) -> Path:
    """The verified folder `out`. dtype: fp32, bf16, fp16, or None for that of an imported checkpoint, else fp32. evaluate: what is known of the
    quality of the checkpoint in a folder, for the model card. Raises UserError; then `out` does not exist."""
    source, final, limit = find(checkpoint), Path(out).absolute(), parse_size(shard_size)  # the check runs in another directory
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"The dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
    with new_folder(final) as folder:
        write_folder(source, folder, dtype, limit, licence, evaluate(source) if evaluate is not None else None)
        verify([(source, folder)])
    return final


if __name__ == "__main__":
    sys.exit(moved("scripts.export"))
