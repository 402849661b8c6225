"""lm-evaluation-harness over any model of evals/adapters/base.py.

    pip install 'everywhen[harness]'
    python -m evals.run checkpoint=DIR suite=harness [tasks=lambada_openai,piqa,FILE.yaml] [samples=200]

A model of transformers is handed to the harness's own class `HFLM`, so its scores are those of the harness. Ours run in a class that asks
the same of the model: the begin token is put where the tokenizer's own template puts one, requests with an empty context begin with the
start of a document, and texts are read whole, the recurrent state carried on in chunks.

Data sets are read from the local cache (HF_HUB_OFFLINE is set unless you set it to 0 yourself): a task whose data is not there is one
sentence in the report. A task may be a YAML file in the harness's format, e.g. over a local JSON file. `samples` limits documents a task.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evals.adapters.base import Adapter, ItemError, first_words
from evals.adapters.hf import HFAdapter
from evals.adapters.own import OwnAdapter

TASKS = "lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa"  # the set of the Mamba papers
NEW_TOKENS = 256  # HFLM's, where a task does not say


def split_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """(ids of the context, ids of the continuation), encoded together, so that the border is where the tokenizer puts it.

    Spaces that end a context go to the continuation.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole, first = encode(context + continuation), encode(context)
    return whole[: len(first)], whole[len(first) :]


def score_pairs(adapter: Adapter, pairs: list[tuple[list[int], list[int]]], chunk: int, batch: int) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding would write it) of each continuation after its context.

    pairs: ids of both; chunk: tokens fed at once; batch: pairs of equal lengths that are fed together. Raises ItemError for an empty context.
    """
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if not context:
            raise ItemError("A request has an empty context, and the tokenizer has no start token to put there.")
        if continuation:
            groups.setdefault((len(context), len(continuation)), []).append(i)
    for members in groups.values():
        for a in range(0, len(members), batch):
            part = members[a : a + batch]
            contexts, targets = torch.tensor([pairs[i][0] for i in part]), torch.tensor([pairs[i][1] for i in part])
            if adapter.reads_whole(contexts.shape[1] + targets.shape[1] - 1):
                whole = torch.cat([contexts, targets[:, :-1]], 1)
                logits = adapter.logits(whole, adapter.start(len(part)))[0][:, -targets.shape[1] :]
            else:
                first, state = adapter.prefill(contexts, chunk)
                logits = first[:, None]
                if targets.shape[1] > 1:
                    logits = torch.cat([logits, adapter.logits(targets[:, :-1], state)[0]], 1)
            log_p, targets = logits.log_softmax(-1), targets.to(logits.device)
            sums = log_p.gather(-1, targets[..., None])[..., 0].double().sum(1)
            if not bool(torch.isfinite(sums).all()):
                raise ItemError(adapter.not_finite())
            right = (logits.argmax(-1) == targets).all(1)
            for i, nats, exact in zip(part, sums.tolist(), right.tolist()):
                scores[i] = (nats, bool(exact))
    return scores


def template_start(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer's own template puts before a text; [] without one."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:place])


def make_lm(adapter: Adapter, chunk: int, batch: int, seed: int = 0, add_bos_token: bool | None = None) -> Any:
    """An lm_eval LM. add_bos_token: whether requests begin with the begin token; None: as the tokenizer says. Raises ItemError when the
    harness is not installed or the model has no tokenizer."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ItemError("lm-evaluation-harness is not installed; pip install 'everywhen[harness]' (or lm_eval).")
    adapter.need_coder()
    if isinstance(adapter, HFAdapter):
        if importlib.util.find_spec("accelerate") is None:
            raise ItemError(
                "The harness's class for models of transformers needs accelerate, which is not installed; pip install 'everywhen[harness]'."
            )
        return _stock(adapter, batch, add_bos_token)
    assert isinstance(adapter, OwnAdapter)
    return _ours(adapter, chunk, batch, seed, add_bos_token)


def _stock(adapter: HFAdapter, batch: int, add_bos_token: bool | None) -> Any:
    """The harness's HFLM with the model as it lies in memory and the tokenizer of its folder."""
    from lm_eval.models.huggingface import HFLM

    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    mixed = "bfloat16" if adapter.precision == "bf16" else None
    model: Any = adapter.model
    return HFLM(
        pretrained=model, tokenizer=hf_tokenizer(adapter), backend="causal", batch_size=batch, mixed_precision_dtype=mixed, **options
    )


def hf_tokenizer(adapter: HFAdapter) -> Any:
    """transformers' tokenizer of the folder, as HFLM would load it; where there is none, one made of the coder's."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(adapter.folder).is_dir():
        try:
            return AutoTokenizer.from_pretrained(adapter.folder, trust_remote_code=adapter.trusted)
        except Exception:  # transformers raises many kinds of error; a folder with only a tokenizer.json still works
            pass
    coder = adapter.need_coder()
    marks = {"bos_token": coder.start_ids[:1], "eos_token": coder.end_ids[:1]}
    names = {key: coder.tokenizer.id_to_token(ids[0]) for key, ids in marks.items() if ids}
    return PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(coder.tokenizer), **names)


def _ours(adapter: OwnAdapter, chunk: int, batch: int, seed: int, add_bos_token: bool | None) -> Any:
    """One of our checkpoints as the harness asks for a model: the names of the methods are the harness's."""
    from lm_eval.api.model import TemplateLM

    coder = adapter.need_coder()
    begin = coder.start_ids if add_bos_token else [] if add_bos_token is False else template_start(coder.tokenizer)

    class Harness(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            if not coder.end_ids:
                raise ItemError("The tokenizer has no token that ends a text, which the harness needs.")
            return coder.end_ids[0]

        @property
        def prefix_token_id(self) -> int:
            return coder.start_ids[0] if coder.start_ids else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [*(begin if add_special_tokens in (None, True) else []), *coder.encode(string)]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            return split_pair(self.tok_encode, context, continuation)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return score_pairs(adapter, [(context, continuation) for _, context, continuation in requests], chunk, batch)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            scores = []
            for request in requests:
                ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
                total: list[float] = []

                def add(first: int, nll: torch.Tensor, state: Any, total: list[float] = total) -> None:
                    total.append(float(nll.double().sum()))

                if adapter.prompt:
                    raise ItemError(
                        "This model sees its prompt whole, so it gives whole texts no likelihood; leave out tasks that ask for one."
                    )
                if len(ids) > 1:
                    adapter.stream(torch.tensor([ids]), chunk, add)
                scores.append(-sum(total))
            return scores

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            written = []
            for number, request in enumerate(requests):
                context, options = request.args[:2]
                written.append(continuation(adapter, self.tok_encode(context) or [self.prefix_token_id], options, seed + number))
            return written

    return Harness()


def continuation(adapter: OwnAdapter, ids: list[int], options: dict[str, Any], seed: int) -> str:
    """The text that the model writes after `ids`, without the stop text or the end-of-text token that it ends at.

    options: the task's generation_kwargs. Raises ItemError for options that we do not have.
    """
    from models.sampling import Sampling, TextStream
    from models.session import Session

    coder = adapter.need_coder()
    sampling, new, until = generation_options(options)
    stops = [stop for stop in ([until] if isinstance(until, str) else until or []) if stop]
    stream = TextStream(coder.tokenizer, ids, stops)

    def stop_when(row: int, token: int) -> bool:
        stream.push(token)
        return stream.stopped

    half = adapter.precision == "bf16"
    session = Session(adapter.model, torch.tensor([ids], device=adapter.device), seed=seed)  # type: ignore[arg-type]
    with torch.autocast(adapter.device.type, torch.bfloat16, enabled=half):  # which a CUDA graph would not keep to
        graph = False if half else None
        new_BN = session.generate(new, Sampling(**sampling), stop_ids=coder.end_ids, stop_when=stop_when, graph=graph)
    written = new_BN[0].tolist()
    end = next((i for i, token in enumerate(written) if token in coder.end_ids), len(written))
    text = coder.decode(written[:end])
    for stop in stops:
        text = text.split(stop)[0]
    return text


def generation_options(options: dict[str, Any]) -> tuple[dict[str, Any], int, Any]:
    """(arguments of models.sampling.Sampling, new tokens, stop texts) of a task's generation_kwargs, read as HFLM and `generate` of transformers
    read them: greedy unless do_sample or a temperature above 0 is given. Raises ItemError for options we do not have."""
    left = dict(options)
    new = next(
        (int(value) for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens") if (value := left.pop(key, None))),
        NEW_TOKENS,
    )
    until, sample, temperature = left.pop("until", None), left.pop("do_sample", None), left.pop("temperature", None)
    if sample is None:
        sample = bool(temperature)
    sampling = {
        "temperature": float(1.0 if temperature is None else temperature) if sample else 0.0,
        "top_k": int(left.pop("top_k", 50) or 0),
        "top_p": float(left.pop("top_p", 1.0)),
        "min_p": float(left.pop("min_p", None) or 0.0),
        "repetition_penalty": float(left.pop("repetition_penalty", 1.0)),
    }
    if left.pop("num_beams", 1) != 1 or left.pop("num_return_sequences", 1) != 1 or left:
        unknown = ", ".join(left) or "num_beams, num_return_sequences"
        raise ItemError(
            f"The task asks for generation options that this model does not have ({unknown}); take them out of its generation_kwargs."
        )
    return sampling, new, until


def task_hash(task: str) -> str:
    """SHA-256 of a task's file and of the local files that it names; of a task of the harness, its name and the harness's version."""
    import importlib.metadata

    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    digest = hashlib.sha256(f"{task if not task.endswith(('.yaml', '.yml')) else ''} {version}".encode())
    for path in _files_of(task):
        try:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        except OSError:
            digest.update(b"missing")
    return digest.hexdigest()


def _files_of(task: str) -> list[Path]:
    """The YAML file and every existing file or folder's file that one of its texts names, relative to it or to where the program runs."""
    import yaml

    if not task.endswith((".yaml", ".yml")):
        return []
    file = Path(task)
    try:
        unread: list[Any] = [yaml.safe_load(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, yaml.YAMLError):
        return [file]
    files = {file}
    while unread:
        value = unread.pop()
        if isinstance(value, (dict, list)):
            unread += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and 0 < len(value) < 1000 and "\n" not in value and "\0" not in value:
            for pattern in (Path(value), file.parent / value):
                files |= _existing(pattern)
    return sorted(files)


def _existing(path: Path) -> set[Path]:
    """The file of that name, the files of that folder, or those that match that pattern; folders that hold the program are left alone."""
    try:
        if path.is_file():
            return {path}
        if path.is_dir() and path.resolve() not in (Path.cwd(), *Path.cwd().parents):
            return {p for p in path.rglob("*") if p.is_file()}
        if any(mark in path.name for mark in "*?["):
            return {p for p in path.parent.glob(path.name) if p.is_file()}
    except (OSError, ValueError):
        pass
    return set()


@functools.lru_cache(maxsize=2)
def task_manager(named: bool) -> Any:
    """The harness's list of tasks, which takes it seconds to make: once for all items; empty for a task that is a file of its own."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def run_task(
    adapter: Adapter, task: str, *, chunk: int, batch: int, limit: int | None, seed: int, add_bos_token: bool | None = None
) -> dict[str, Any]:
    """The harness's own figures for a task: a name, or a YAML file that defines one. Raises ItemError when its data is not here."""
    lm = make_lm(adapter, chunk, batch, seed, add_bos_token)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    import lm_eval
    from datasets.exceptions import DatasetNotFoundError

    chosen: Any = task
    if task.endswith((".yaml", ".yml")):
        import yaml

        try:
            chosen = yaml.safe_load(Path(task).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ItemError(f"The task {task} cannot be read: {first_words(error)}") from error
    try:
        outcome = lm_eval.simple_evaluate(
            model=lm,
            tasks=[chosen],
            task_manager=task_manager(chosen is task),
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError, DatasetNotFoundError) as error:
        raise ItemError(f"The data of task {task} is not on this machine ({first_words(error)[:120]}).") from error
    except (KeyError, ValueError) as error:
        raise ItemError(f"lm-evaluation-harness cannot run task {task}: {first_words(error)}") from error
    assert outcome is not None
    name, figures = next(iter(outcome["results"].items()))
    numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    samples = outcome.get("n-samples", {}).get(name, {}).get("effective")
    shown = {key.split(",")[0]: value for key, value in numbers.items() if "stderr" not in key and "," in key}
    summary = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    scorer = "HFLM" if isinstance(adapter, HFAdapter) else "ours"
    return {"task": name, "figures": numbers, "samples": samples, "lm_eval": lm_eval.__version__, "scored_by": scorer, "summary": summary}
