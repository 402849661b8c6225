"""The arms of the state-collapse study (scripts/long_context_study.py): small models trained on one corpus, then looked at far beyond their
training length T.

An arm trains on windows of T tokens of one stream (end-of-text marks, no resets), as the evaluations feed it, for a number of tokens that
is the same for all arms unless time runs out. On a GPU the tokens lie on the device and a step is one CUDA graph. Training saves weights,
train.json, and at 10, 25, 50 and 100 % of the tokens a position curve, since more training may mean less forgetting (arXiv 2410.07145, fig. 8).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.shards import ShardSet
from evals.adapters import ItemError, OwnAdapter
from evals.position import collapse, position_curve, windows
from evals.texts import Text
from models.config import ModelConfig
from models.lm import LanguageModel, LMState
from training.files import write_json
from training.graphed import GraphedStep, Rate
from training.initial_state import InitialStates
from training.optim import build_optimizer
from training.schedule import lr_factor

SHORT, LONG, SHORTER = 128, 1024, 64
SLOW = {"dt_min": 1e-4, "dt_max": 1e-2}  # steps ten times smaller than usual: memories of 6 to 10,000 tokens from the start
# In order of importance. from: starts from that arm's weights. share: of the tokens of an arm.
ARMS: dict[str, dict[str, Any]] = {
    "mamba2-n256-t128": {"pattern": ["m"], "N": 256, "T": SHORT},
    "mamba2-n256-t128-pass": {"pattern": ["m"], "N": 256, "T": SHORT, "initial": "pass"},
    "mamba2-n256-t128-slow": {"pattern": ["m"], "N": 256, "T": SHORT, "mixer": SLOW},
    "mamba2-n32-t128": {"pattern": ["m"], "N": 32, "T": SHORT},
    "mamba2-n256-t1024": {"pattern": ["m"], "N": 256, "T": LONG},
    "mamba2-n32-t1024": {"pattern": ["m"], "N": 32, "T": LONG},
    "paragru-t128": {"pattern": ["g"], "N": 0, "T": SHORT},
    "hybrid-t128": {"pattern": ["g", "m", "g", "a"], "N": 64, "T": SHORT},
    "mamba2-n256-t64-slow": {"pattern": ["m"], "N": 256, "T": SHORTER, "mixer": SLOW},
    "mamba2-n256-t128-then-pass": {"pattern": ["m"], "N": 256, "T": SHORT, "initial": "pass", "from": "mamba2-n256-t128", "share": 0.1},
    "mamba2-n256-t128-slow-then-pass": {
        "pattern": ["m"], "N": 256, "T": SHORT, "mixer": SLOW, "initial": "pass", "from": "mamba2-n256-t128-slow", "share": 0.1,
    },
}  # fmt: skip
CURED = ("mamba2-n256-t128", "mamba2-n256-t128-slow", "mamba2-n256-t64-slow")  # evaluated under every cure that needs no training
HISTORY = (0.1, 0.25, 0.5)  # and at the end
BEYOND = 256  # times T: the longest sequence


def training_length(arm: dict[str, Any], toy: bool) -> int:
    return arm["T"] // 4 if toy else arm["T"]


def model_config(arm: dict[str, Any], vocab_size: int, values: dict[str, Any]) -> dict[str, Any]:
    toy = values["toy"]
    mamba2 = {"type": "mamba2", "d_state": min(arm["N"], 16) if toy else arm["N"], "head_dim": 32 if toy else 64, "chunk": 128}
    mixers = {
        "m": mamba2 | arm.get("mixer", {}),
        "g": {"type": "rnn", "cell": "paragru", "n_heads": 4},
        "a": {"type": "attention", "n_heads": 4},
    }
    pattern = arm["pattern"]
    deep = values["layers"] if pattern == ["m"] else values["layers"] // 2  # blocks with an MLP hold about twice the parameters
    return {
        "vocab_size": -(-vocab_size // 64) * 64,
        "d_model": 64 if toy else values["width"],
        "n_layers": max(len(pattern), 2 if toy else deep),
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in dict.fromkeys(pattern)},
        "d_ff": 0 if pattern == ["m"] else -1,
        "tie_embeddings": True,
        "head_chunk": 8192,
    }


def tensors_of(state: LMState) -> list[Tensor]:
    """All tensors of a state, in a fixed order."""
    return [v for part in state.layers for f in dataclasses.fields(part) if isinstance(v := getattr(part, f.name), Tensor)]


def with_tensors(state: LMState, tensors: tuple[Tensor, ...]) -> LMState:
    """`state` with its tensors replaced, in the order of `tensors_of`."""
    rest = iter(tensors)
    layers = []
    for part in state.layers:
        names = [f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), Tensor)]
        layers.append(dataclasses.replace(part, **{name: next(rest) for name in names}))
    return LMState(layers)


class Arm:
    """A model in training: its data on the device, its optimizer, and the step."""

    def __init__(self, name: str, values: dict[str, Any], device: torch.device) -> None:
        self.name, self.values, self.device, self.spec = name, values, device, ARMS[name]
        self.folder = Path(values["out"]) / "arms" / name
        self.T = training_length(self.spec, values["toy"])
        self.shards = ShardSet(values["data"], "train")
        self.config = model_config(self.spec, self.shards.vocab_size, values)
        model = LanguageModel(ModelConfig.from_dict(self.config))
        model.init_weights(values["seed"])
        if "from" in self.spec:
            weights = load_file(self.folder.parent / self.spec["from"] / "model.safetensors")
            with torch.no_grad():
                for key, p in model.named_parameters():
                    p.copy_(weights[key])
        self.model = model.to(device).train()
        self.optimizer = build_optimizer(self.model, lr=values["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.rate, self.peak = Rate(self.optimizer, device), values["lr"] * (0.5 if "from" in self.spec else 1.0)
        self.rows = max(1, values["tokens_per_step"] // self.T)
        self.tokens = torch.from_numpy(np.asarray(self.shards.read(0, self.shards.n_tokens)).astype(np.int16)).to(device)
        self.window = torch.arange(self.T + 1, device=device)
        self.initial = InitialStates(self.spec.get("initial", "zero"), seed=values["seed"])
        self.template: LMState | None = None
        self.graphed = GraphedStep(self._step, device)

    def _step(self, offsets_B: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        """(loss, gradient norm, tensors of the state at the end)."""
        ids = self.tokens[offsets_B[:, None] + self.window].long()
        state = with_tensors(self.template, before) if self.template is not None else None
        self.optimizer.zero_grad(set_to_none=True)
        bf16 = self.values["precision"] == "bf16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.model(ids[:, :-1], labels=ids[:, 1:], state=state)
        loss = output.loss_sum / output.token_count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        after = [t.detach() for t in tensors_of(output.state)] if output.state is not None else []
        return loss.detach(), norm.detach(), *after

    def step(self, offsets: np.ndarray, progress: float) -> tuple[Tensor, Tensor]:
        """One optimizer step at `progress` of the training; (loss, gradient norm) on the device."""
        self.rate.set(self.peak * lr_factor(round(progress * 10_000), 10_000, kind="wsd", warmup=300, decay=2000, final=0.0))
        self.template = self.initial.before(self.model, 0, self.rows)
        before = tensors_of(self.template) if self.template is not None else []
        loss, norm, *after = self.graphed(torch.from_numpy(offsets).to(self.device), *before)
        if self.template is not None:
            self.initial.after(0, with_tensors(self.template, tuple(after)))
        return loss, norm

    def curve(self, beyond: int, rows: int) -> dict[str, Any]:
        """Loss by position on held-out text now, and what `collapse` makes of it."""
        held_out = ShardSet(self.values["data"], "valid")
        text = Text(np.asarray(held_out.read(0, held_out.n_tokens)), "held out", held_out.n_bytes / held_out.n_tokens)
        adapter = OwnAdapter(self.model, None, self.name, "", self.values["precision"] if self.device.type == "cuda" else "fp32")
        try:
            ids = text.rows(rows, beyond * self.T + 1, 0)
            buckets = position_curve(adapter, ids, chunk=2048, batch=rows, through=self.T)["buckets"]
            return {"collapse": collapse(buckets, self.T, windows(adapter, ids, self.T, batch=128)), "buckets": buckets}
        except ItemError as error:
            return {"failed": str(error)}
        finally:
            self.model.train()


def train(name: str, values: dict[str, Any], device: torch.device) -> None:
    """Trains one arm and saves its weights; progress and figures in train.json."""
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext():
        arm = Arm(name, values, device)
        log, history, seconds = _loop(arm)
    _save(arm, log, history, seconds)


def _loop(arm: Arm) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """(log, history of position curves, seconds). Ends with the tokens, with the time, or where the loss is not finite."""
    values, tokens_a_step = arm.values, arm.rows * arm.T
    steps = max(1, math.ceil(values["tokens"] * arm.spec.get("share", 1.0) / tokens_a_step))
    rng, log, history, due = np.random.default_rng([values["seed"], arm.T]), [], [], list(HISTORY)
    start, step, progress, looking = time.perf_counter(), 0, 0.0, 0.0
    while progress < 1:
        loss, norm = arm.step(rng.integers(0, len(arm.tokens) - arm.T - 1, arm.rows), progress)
        step += 1
        if step % 20 == 0:
            loss.item()  # the clock below is the device's too
        seconds = time.perf_counter() - start - looking
        progress = max(step / steps, seconds / values["train_seconds"])
        if step in (1, 10) or step % 200 == 0 or progress >= 1:
            row = {"step": step, "tokens": step * tokens_a_step, "loss": float(loss), "gradient_norm": float(norm), "seconds": seconds}
            log.append(row)
            print(
                f"{arm.name}: step {step} of {steps}, {row['tokens']:,} tokens, loss {row['loss']:.4f}, {row['tokens'] / seconds:,.0f} tokens/s",
                flush=True,
            )
            if not math.isfinite(row["loss"]):
                break
        if due and progress >= due[0] or progress >= 1:
            due, began = due[1:], time.perf_counter()
            history.append({"tokens": step * tokens_a_step, "progress": progress, **arm.curve(8 if values["toy"] else 64, 4)})
            looking += time.perf_counter() - began
    return log, history, time.perf_counter() - start


def _save(arm: Arm, log: list[dict[str, Any]], history: list[dict[str, Any]], seconds: float) -> None:
    folder, values, device = arm.folder, arm.values, arm.device
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().float().cpu().contiguous() for k, v in dict(arm.model.named_parameters()).items()}, folder / "model.safetensors")
    write_json(folder / "config.json", arm.config)
    (folder / "tokenizer.json").write_text(arm.shards.tokenizer().to_str())
    write_json(folder / "run.json", {"train": {"seq_len": arm.T}, "data": {"path": values["data"]}})
    recurrent = [b.mixer for b in arm.model.blocks if not hasattr(b.mixer, "q_proj")]
    result = {
        "arm": arm.name,
        **arm.spec,
        "T": arm.T,
        "parameters": sum(p.numel() for p in arm.model.parameters()),
        "state_elements": sum(t.numel() for m in recurrent for t in _state_tensors(m)),
        "tokens": log[-1]["tokens"],
        "epochs": log[-1]["tokens"] / len(arm.tokens),
        "steps": log[-1]["step"],
        "loss": log[-1]["loss"],
        "tokens_per_second": log[-1]["tokens"] / log[-1]["seconds"],
        "seconds": seconds,
        "graphed": not arm.graphed.why_not,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "data_fingerprint": arm.shards.fingerprint,
        "settings": values,
        "history": history,
        "log": log,
    }
    write_json(folder / "train.json", result)


def _state_tensors(mixer: Any) -> list[Tensor]:
    part = mixer.init_state(1, "cpu")
    return [v for f in dataclasses.fields(part) if isinstance(v := getattr(part, f.name), Tensor) and v.is_floating_point()]


def measure(name: str, values: dict[str, Any], device: torch.device) -> None:
    """The suites' items on a trained arm."""
    from evals.suites import Settings, evaluate

    folder, toy = Path(values["out"]) / "arms" / name, values["toy"]
    T = json.loads((folder / "run.json").read_text())["train"]["seq_len"]
    cures = values["cures"] and name in CURED
    only = "position-prose,states-prose,remembrance,passkey-512" + (",cure-" if cures else "")
    settings = Settings(
        suite="long_context", only=only, lengths=[512], samples=10, depths=5, cures="default" if cures else "none", train_length=T,
        max_length=(32 if toy else BEYOND if T <= SHORT else 64) * T, data=values["data"], rows=2 if toy else 16, chunk=2048, batch=16,
    )  # fmt: skip
    evaluate([str(folder)], settings, Path(values["out"]) / "evals", "auto" if device.type == "cuda" else "cpu", _precision(values, device))


def _precision(values: dict[str, Any], device: torch.device) -> str:
    return values["precision"] if device.type == "cuda" else "fp32"
