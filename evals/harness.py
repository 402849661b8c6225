"""lm-evaluation-harness over any model of evals/adapters.py, the recurrent state carried through long contexts in chunks.

    pip install 'everywhen[harness]'
    python -m evals.run checkpoint=DIR suite=harness [tasks=lambada_openai,piqa,FILE.yaml] [samples=200]

Data sets are read from the local cache (HF_HUB_OFFLINE is set unless you set it to 0 yourself): a task whose data is not there is one
sentence in the report. A task may be a YAML file in the harness's format, e.g. over a local JSON file. `samples` limits documents a task.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evals.adapters import Adapter, ItemError, first_words

TASKS = "lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa"  # the set of the Mamba papers


def split_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, encoded together, so that the border is where the tokenizer puts it; spaces that end a context go to the continuation."""
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole, first = encode(context + continuation), encode(context)
    return whole[: len(first)], whole[len(first) :]


def score_pairs(adapter: Adapter, pairs: list[tuple[list[int], list[int]]], chunk: int, batch: int) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether greedy decoding would write it) of each continuation after its context. Equal shapes share a batch."""
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
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
            if adapter.carry == "none":
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
                found[i] = (nats, bool(exact))
    return found


def make_lm(adapter: Adapter, chunk: int, batch: int) -> Any:
    """An lm_eval LM. Raises ItemError when the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ItemError("lm-evaluation-harness is not installed; pip install 'everywhen[harness]' (or lm_eval).")
    from lm_eval.api.model import LM

    coder = adapter.need_coder()
    limit = adapter.position_limit

    class Harness(LM):
        def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = []
            for request in requests:
                context, continuation = split_pair(coder.encode, *request.args[:2])
                context = [*coder.start_ids, *context]
                if limit is not None:  # as the harness does: the oldest tokens go
                    context = context[max(0, len(context) + len(continuation) - limit) :]
                pairs.append((context, continuation))
            return score_pairs(adapter, pairs, chunk, batch)

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
            results = []
            for request in requests:
                ids = coder.encode(request.args[0], start=True)
                total: list[float] = []

                def add(first: int, nll: torch.Tensor, state: Any, total: list[float] = total) -> None:
                    total.append(float(nll.double().sum()))

                if len(ids) > 1:
                    adapter.stream(torch.tensor([ids]), chunk, add)
                results.append(-sum(total))
            return results

        def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
            results = []
            for request in requests:
                context, options = request.args[:2]
                stops = options.get("until") or []
                stops = [stops] if isinstance(stops, str) else stops
                ids = torch.tensor([coder.encode(context, start=True)])
                new = int(options.get("max_gen_toks", 64))
                text = coder.decode(adapter.greedy(ids, new, chunk)[0].tolist())
                for stop in stops:
                    text = text.split(stop)[0] if stop else text
                results.append(text)
            return results

    return Harness()


def run_task(adapter: Adapter, task: str, *, chunk: int, batch: int, limit: int | None, seed: int) -> dict[str, Any]:
    """The harness's own figures for a task: a name, or a YAML file that defines one. Raises ItemError when its data is not here."""
    lm = make_lm(adapter, chunk, batch)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    import lm_eval
    from datasets.exceptions import DatasetNotFoundError

    chosen: Any = task
    if task.endswith((".yaml", ".yml")):
        import yaml

        try:
            chosen = yaml.safe_load(Path(task).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ItemError(f"The task {task} cannot be read: {first_words(error)}") from error
    try:
        found = lm_eval.simple_evaluate(
            model=lm,
            tasks=[chosen],
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
    assert found is not None
    name, figures = next(iter(found["results"].items()))
    numbers = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
    samples = found.get("n-samples", {}).get(name, {}).get("effective")
    shown = {key.split(",")[0]: value for key, value in numbers.items() if "stderr" not in key and "," in key}
    summary = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    return {"task": name, "figures": numbers, "samples": samples, "lm_eval": lm_eval.__version__, "summary": summary}
