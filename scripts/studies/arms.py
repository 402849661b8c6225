"""The arms of the state-collapse study (scripts/studies/collapse.py): small models trained on one corpus by scripts/studies/trainer.py, then looked
at far beyond their training length T.

An arm trains on windows of T tokens of one stream (end-of-text marks, no resets), as the evaluations feed it, for a number of tokens that
is the same for all arms; stopped, it goes on where it was. On a GPU the tokens lie on the device and a step is one CUDA graph. Training saves weights,
train.json, and at 10, 50 and 100 % of the tokens a position curve, since more training may mean less forgetting (arXiv 2410.07145, fig. 8).
Legend: B rows of a batch, T tokens of a window, N entries of a Mamba-2 state a channel.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data.files import save_tensors, write_bytes, write_json
from data.shards import ShardSet
from evals.adapters.base import ItemError
from evals.adapters.own import OwnAdapter
from evals.inputs.texts import Text
from evals.measures.position import collapse, position_curve, unlearnt_rows, windows
from models.config import ModelConfig
from models.contract import state_tensors
from models.init import roles
from models.lm import LanguageModel, LMState
from scripts.studies.trainer import Trainer
from training.initial_state import InitialStates
from training.schedule import lr_factor
from training.watch.metrics import environment

# Lengths T and Mamba-2 states a head that the arms are made of, their models, their training, and how far (times T) and in how many rows they are
# looked at.
SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "T": {"shorter": 64, "short": 128, "long": 1024}, "N": {"small": 32, "middle": 64, "large": 256}, "head_dim": 64, "chunk": 128,
        "layers": 8, "width": 256, "tokens": 1e8, "tokens_per_step": 16384, "lr": 2e-3, "hybrid": "gmga", "beyond": 256, "rows": 16,
    },
    "cpu": {
        "T": {"shorter": 16, "short": 32, "long": 256}, "N": {"small": 16, "middle": 32, "large": 128}, "head_dim": 32, "chunk": 32,
        "layers": 1, "width": 64, "tokens": 3e5, "tokens_per_step": 512, "lr": 4e-3, "hybrid": "ma", "beyond": 64, "rows": 8,
    },
}  # fmt: skip
# Initial -A of a head, whose memory is 1 / (dt A) tokens. With the usual 1 to 16 no state grows beyond insertion / A, whatever the step size; with
# these it goes on growing for 600 to a million tokens at the usual step sizes, unless training teaches it to forget.
SLOW, MIDDLE = (0.001, 0.016), (0.1, 1.0)
HISTORY = (0.1, 0.5)  # and at the end
SAVE_EVERY = 60.0  # seconds between two savings of an arm in training


class TimeUp(Exception):
    """The seconds given are over; the arm has been saved as it is."""


def study_arms(size: str) -> dict[str, dict[str, Any]]:
    """The arms of a size, in order of importance. from: starts from that arm's weights. share: of the tokens of an arm. cured: evaluated
    under every cure that needs no training."""
    T, N = SIZES[size]["T"], SIZES[size]["N"]
    short = f"t{T['short']}"
    large = f"mamba2-n{N['large']}"

    def mamba2(states: str, length: str, **more: Any) -> dict[str, Any]:
        return {"pattern": ["m"], "N": N[states], "T": T[length], **more}

    slow: dict[str, Any] = {"decay": SLOW}
    n, t = N["small"], T["long"]
    return {
        f"{large}-{short}-slow": mamba2("large", "short", **slow, cured=True),
        f"{large}-{short}-slow-pass": mamba2("large", "short", **slow, initial="pass"),
        f"mamba2-n{n}-{short}-slow": mamba2("small", "short", **slow),
        f"{large}-t{t}-slow": mamba2("large", "long", **slow, beyond=64),
        f"mamba2-n{n}-t{t}-slow": mamba2("small", "long", **slow, beyond=64),
        f"paragru-{short}": {"pattern": ["g"], "N": 0, "T": T["short"]},
        f"dense_lstm-{short}": {"pattern": ["l"], "N": 0, "T": T["short"]},
        f"slstm-{short}": {"pattern": ["s"], "N": 0, "T": T["short"]},
        f"hybrid-{short}-slow": {"pattern": list(SIZES[size]["hybrid"]), "N": N["middle"], "T": T["short"], **slow},
        f"{large}-{short}-slow-then-pass": mamba2("large", "short", **slow, initial="pass", share=0.1, **{"from": f"{large}-{short}-slow"}),
        f"{large}-{short}": mamba2("large", "short", cured=True),
        f"mamba2-n{n}-{short}": mamba2("small", "short"),
        f"{large}-t{t}": mamba2("large", "long", beyond=64),
        f"mamba2-n{n}-t{t}": mamba2("small", "long", beyond=64),
        f"{large}-{short}-pass": mamba2("large", "short", initial="pass"),
        f"{large}-{short}-then-pass": mamba2("large", "short", initial="pass", share=0.1, **{"from": f"{large}-{short}"}),
        f"{large}-{short}-middle": mamba2("large", "short", decay=MIDDLE),
        f"{large}-t{T['shorter']}-slow": mamba2("large", "shorter", **slow),
    }


def model_config(arm: dict[str, Any], vocab_size: int, values: dict[str, Any]) -> dict[str, Any]:
    """The ModelConfig of an arm, as a mapping; the vocabulary is rounded up to a multiple of 64."""
    size = SIZES[values["size"]]
    mixers = {
        "m": {"type": "mamba2", "d_state": arm["N"], "head_dim": size["head_dim"], "chunk": size["chunk"]},
        "g": {"type": "rnn", "cell": "paragru", "n_heads": 4},
        "l": {"type": "rnn", "cell": "dense_lstm", "head_size": size["head_dim"]},
        "s": {"type": "rnn", "cell": "slstm", "head_size": size["head_dim"]},
        "a": {"type": "attention", "n_heads": 4},
    }
    pattern = arm["pattern"]
    deep = values["layers"] if pattern == ["m"] else values["layers"] // 2  # blocks with an MLP hold about twice the parameters
    return {
        "vocab_size": -(-vocab_size // 64) * 64,
        "d_model": values["width"],
        "n_layers": max(len(pattern), deep),
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in dict.fromkeys(pattern)},
        "d_ff": 0 if pattern == ["m"] else -1,
        "tie_embeddings": True,
        "head_chunk": 8192,
    }


def tensors_of(state: LMState) -> list[Tensor]:
    """All tensors of a state, in a fixed order."""
    return [tensor for part in state.layers for tensor in state_tensors(part).values()]


def with_tensors(state: LMState, tensors: tuple[Tensor, ...]) -> LMState:
    """`state` with its tensors replaced, in the order of `tensors_of`."""
    rest = iter(tensors)
    layers = []
    for part in state.layers:
        layers.append(dataclasses.replace(part, **{name: next(rest) for name in state_tensors(part)}))
    return LMState(layers)


class Arm:
    """One arm in training: its text on the device, its trainer, and what its rows begin with."""

    def __init__(self, name: str, values: dict[str, Any], device: torch.device) -> None:
        self.name, self.values, self.device, self.spec = name, values, device, study_arms(values["size"])[name]
        self.folder = Path(values["out"]) / "arms" / name
        self.T = self.spec["T"]
        self.shards = ShardSet(values["data"], "train")
        self.config = model_config(self.spec, self.shards.vocab_size, values)
        bf16, lr = values["precision"] == "bf16", values["lr"]
        self.trainer = Trainer(self._new_model(), device, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, bf16=bf16)
        self.model, self.peak = self.trainer.model, lr * (0.5 if "from" in self.spec else 1.0)
        self.rows = max(1, values["tokens_per_step"] // self.T)
        with self.trainer.here():
            self.tokens = torch.from_numpy(np.asarray(self.shards.read(0, self.shards.n_tokens)).astype(np.int16)).to(device)
            self.window = torch.arange(self.T + 1, device=device)
        self.initial = InitialStates(self.spec.get("initial", "zero"), seed=values["seed"])
        self.template: LMState | None = None  # the state that rows begin with; its tensors are inputs of the step
        self.step = self.trainer.graph(self._step)

    def _new_model(self) -> LanguageModel:
        """Initialised as the arm asks: with slow memories (decay), or with the weights of the arm that it goes on from."""
        model = LanguageModel(ModelConfig.from_dict(self.config))
        model.init_weights(self.values["seed"])
        for block in model.blocks if "decay" in self.spec else ():
            for rate in (p for p in block.mixer.parameters() if "log_decay_rate" in roles(p)):
                rate.data = torch.linspace(*self.spec["decay"], len(rate)).log()
        if "from" in self.spec:
            weights = load_file(self.folder.parent / self.spec["from"] / "model.safetensors")
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p.copy_(weights[key])
        return model

    def _step(self, offsets_B: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        """One step on the windows that begin at these tokens: (loss, gradient norm, tensors of the state at the end)."""
        ids = self.tokens[offsets_B[:, None] + self.window].long()
        state = with_tensors(self.template, before) if self.template is not None else None
        loss, norm, after = self.trainer.update(ids[:, :-1], ids[:, 1:], state)
        return loss, norm, *([t.detach() for t in tensors_of(after)] if after is not None else [])

    def steps(self, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Takes the optimizer steps `first` to `last` of `last`; (number, loss, gradient norm), on the device, after each.

        Step n draws its windows from (seed, T, n) alone.
        """

        def rate(number: int) -> float:
            progress = round((number - 1) / last * 10_000)
            return self.peak * lr_factor(progress, 10_000, kind="wsd", warmup=300, decay=2000, final=0.0)

        def inputs(number: int) -> tuple[Tensor, ...]:
            rng = np.random.default_rng([self.values["seed"], self.T, number])
            offsets_B = rng.integers(0, len(self.tokens) - self.T - 1, self.rows)
            self.template = self.initial.before(self.model, 0, self.rows)
            return torch.from_numpy(offsets_B).to(self.device), *(tensors_of(self.template) if self.template is not None else [])

        for number, (loss, norm, *after) in self.trainer.run(self.step, range(first, last + 1), rate, inputs):
            if self.template is not None:
                self.initial.after(0, with_tensors(self.template, tuple(after)))
            yield number, loss, norm

    def curve(self, beyond: int, rows: int) -> dict[str, Any]:
        """Loss by position on `rows` rows of held-out text, each `beyond` training lengths long, and what `collapse` makes of it."""
        held_out = ShardSet(self.values["data"], "valid")
        text = Text(np.asarray(held_out.read(0, held_out.n_tokens)), "held out", held_out.n_bytes / held_out.n_tokens)
        adapter = OwnAdapter(self.model, None, self.name, "", self.values["precision"] if self.device.type == "cuda" else "fp32")
        try:
            ids = text.rows(*text.fitting(rows, beyond * self.T + 1), 0)
            buckets = position_curve(adapter, ids, chunk=2048, batch=rows, through=self.T)["buckets"]
            same = windows(adapter, ids, self.T, batch=128)
            return {"collapse": collapse(buckets, self.T, same, unlearnt_rows(same, ids, text.ids, adapter.vocab_size)), "buckets": buckets}
        except ItemError as error:
            return {"failed": str(error)}
        finally:
            self.model.train()

    def save_progress(self, record: dict[str, Any]) -> None:
        """Weights, moments and `record` (steps done, log, ...) in one file, so that the arm goes on from here."""
        tensors = {f"weight.{k}": p for k, p in self.model.named_parameters()}
        for i, p in enumerate(self.trainer.parameters()):
            tensors |= {f"{name}.{i}": value for name, value in self.trainer.optimizer.state[p].items()}
        on_cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_bytes(self.folder / "under_way.safetensors", save(on_cpu, {"record": json.dumps(record)}))

    def load_progress(self) -> dict[str, Any]:
        """The record that `save_progress` was given last, everything else set back to that moment; {} if there is none."""
        path = self.folder / "under_way.safetensors"
        if not path.exists():
            return {}
        with safe_open(path, "pt") as file:
            record, tensors = json.loads(file.metadata()["record"]), {key: file.get_tensor(key) for key in file.keys()}
        with torch.no_grad():
            for key, p in self.model.named_parameters():
                p.copy_(tensors[f"weight.{key}"])
        for i, p in enumerate(self.trainer.parameters()):
            names = [key for key in tensors if key.endswith(f".{i}") and not key.startswith("weight.")]
            self.trainer.optimizer.state[p] = {key.rpartition(".")[0]: tensors[key].to(p.device) for key in names}
        return record


def train(name: str, values: dict[str, Any], device: torch.device) -> None:
    """Trains one arm, from where it was stopped, and saves its weights; progress and figures in train.json. Raises TimeUp."""
    arm = Arm(name, values, device)
    with arm.trainer.here():
        _save(arm, _loop(arm))
    (arm.folder / "under_way.safetensors").unlink(missing_ok=True)


def _loop(arm: Arm) -> dict[str, Any]:
    """{step, seconds (looking at the model left out), stops, log, history}. Ends with the tokens or where the loss is not finite.

    States handed on from batch to batch are not saved: after a stop they begin at zero.
    """
    values, tokens_a_step = arm.values, arm.rows * arm.T
    steps = max(1, math.ceil(values["tokens"] * arm.spec.get("share", 1.0) / tokens_a_step))
    record: dict[str, Any] = {"step": 0, "seconds": 0.0, "stops": -1, "log": [], "history": []} | arm.load_progress()
    record["stops"] += 1
    start, saved = time.perf_counter() - record["seconds"], time.perf_counter()
    for step, loss, norm in arm.steps(record["step"] + 1, steps):
        if step % 20 == 0:
            loss.item()  # the clock below is the device's too
        record |= {"step": step, "seconds": time.perf_counter() - start}
        if step in (1, 10) or step % max(1, steps // 20) == 0 or step == steps:
            row = {
                "step": step,
                "tokens": step * tokens_a_step,
                "loss": float(loss),
                "gradient_norm": float(norm),
                "seconds": record["seconds"],
            }
            record["log"].append(row)
            print(f"{arm.name}: step {step} of {steps}, loss {row['loss']:.4f}, {row['tokens'] / row['seconds']:,.0f} tokens/s", flush=True)
            if not math.isfinite(row["loss"]):
                break
        if step == steps or step in [math.ceil(part * steps) for part in HISTORY]:
            looking = time.perf_counter()
            record["history"].append(
                {"tokens": step * tokens_a_step, "progress": step / steps, **arm.curve(64, SIZES[values["size"]]["rows"] // 4)}
            )
            start += time.perf_counter() - looking
        over = values["until"] and time.time() > values["until"]
        if step < steps and (over or time.perf_counter() - saved > SAVE_EVERY):
            saved = time.perf_counter()
            arm.save_progress(record)
            if over:
                raise TimeUp(f"{arm.name}: stopped after step {step} of {steps}")
    return record


def _save(arm: Arm, record: dict[str, Any]) -> None:
    """The folder of a finished arm: what load_adapter reads, and train.json."""
    folder, values, device, log = arm.folder, arm.values, arm.device, record["log"]
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().float().cpu().contiguous() for name, parameter in arm.model.named_parameters()}
    save_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", arm.config)
    (folder / "tokenizer.json").write_text(arm.shards.tokenizer().to_str())
    write_json(folder / "tokenizer_config.json", arm.shards.tokenizer_config())
    write_json(folder / "run.json", {"train": {"seq_len": arm.T}, "data": {"path": values["data"]}})
    recurrent = [b.mixer for b in arm.model.blocks if not b.mixer.grows()]
    result = {
        "arm": arm.name,
        **arm.spec,
        "T": arm.T,
        "parameters": sum(p.numel() for p in arm.model.parameters()),
        "state_elements": sum(t.numel() for m in recurrent for t in m.tensors_of(m.init_state(1, "meta"), "recurrent", "history").values()),
        "tokens": log[-1]["tokens"],
        "epochs": log[-1]["tokens"] / len(arm.tokens),
        "steps": log[-1]["step"],
        "loss": log[-1]["loss"],
        "tokens_per_second": log[-1]["tokens"] / log[-1]["seconds"],
        "seconds": record["seconds"],
        "stops": record["stops"],
        "graphed": not arm.step.why_not,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "data_fingerprint": arm.shards.fingerprint,
        "settings": values,
        "environment": environment(device),
        "history": record["history"],
        "log": log,
    }
    write_json(folder / "train.json", result)


def measure(name: str, values: dict[str, Any], device: torch.device) -> None:
    """The suites' items on a trained arm."""
    from evals.suites.runner import evaluate
    from evals.suites.subject import Settings

    arm, size = study_arms(values["size"])[name], SIZES[values["size"]]
    T = arm["T"]
    cures = values["cures"] and arm.get("cured", False)
    only = (
        "position-prose,position-constant,states-prose,states-constant,remembrance"
        + (",passkey-512" if values["size"] == "gpu" else "")
        + (",cure-" if cures else "")
    )
    settings = Settings(
        suite="long_context", only=only, lengths=[512], samples=10, depths=5, cures="default" if cures else "none", train_length=T,
        max_length=arm.get("beyond", size["beyond"]) * T, data=values["data"], rows=size["rows"], chunk=2048, batch=16,
    )  # fmt: skip
    folder = str(Path(values["out"]) / "arms" / name)
    evaluate([folder], settings, Path(values["out"]) / "evals", "auto" if device.type == "cuda" else "cpu", _precision(values, device))


def _precision(values: dict[str, Any], device: torch.device) -> str:
    return values["precision"] if device.type == "cuda" else "fp32"
