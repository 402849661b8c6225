"""A trained transformer to hybrids: half of its attention replaced by each of several mixers, which begin from the attention's weights or anew.

python -m scripts.studies.conversion --teacher FOLDER --data SHARDS --tokens 2000000 --out docs/results/methods/conversion_smollm2.json

FOLDER is what model=hf: reads, SHARDS are of its tokenizer. A run learns the teacher's distribution for `--kl` of its steps and the next token
afterwards; held-out loss, in nats a token, before, at several stated numbers of tokens, and at the end. Copied mixers begin with outputs of the
size that the attention's have on a batch of the text. docs/methods/conversion.md has what was found.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from data.errors import UserError
from data.files import write_json
from models.checkpoint import load_model
from models.convert import converted, sizes_of, targets
from models.hub.importing import is_foreign, read_stock
from models.lm import LanguageModel
from scripts.studies.options import refuse
from scripts.studies.text import Text, device_of
from training.distill import Distillation
from training.optim import build_optimizer
from training.schedule import lr_factor
from training.watch.metrics import environment

MARKS = (0.0625, 0.125, 0.25, 0.5, 1.0)  # of a run's tokens, at which the held-out loss is taken


class Conversion:
    """A teacher, a text, and the runs of students."""

    def __init__(self, teacher: LanguageModel, text: Text, rows: int, windows: int, kl: float) -> None:
        self.teacher, self.text, self.rows, self.windows, self.kl = teacher, text, rows, windows, kl
        self.layers = list(range(0, teacher.config.n_layers, 2))
        with self.autocast():
            self.sizes = sizes_of(teacher, self.layers, text.batch(8, 0, 10**6)[0])

    def autocast(self) -> Any:
        device = self.text.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def held_out(self, model: LanguageModel) -> float:
        with self.autocast():
            return self.text.held_out(model, self.windows)

    def run(self, target: str, start: str, rate: float, seed: int, tokens: int, ends: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """One student over `tokens` tokens (fewer where `ends` says so): its settings, held-out losses by tokens, tokens a second."""
        student = converted(self.teacher, self.layers, target, seed, start == "copied", sizes=self.sizes).train().requires_grad_(True)
        a_step = self.rows * self.text.length
        steps = max(1, tokens // a_step)
        student.beside = Distillation(self.teacher, 1.0, 0.0, until=lambda: round(self.kl * steps), chunk=4096)
        optimizer = build_optimizer(student, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
        marks = {max(1, round(mark * steps)) for mark in MARKS} | {round(self.kl * steps)}
        row: dict[str, Any] = {"target": target, "start": start, "rate": rate, "seed": seed, "tokens": steps * a_step}
        row["held_out"] = [[0, round(self.held_out(student), 4)]]
        began, spent, warm = time.perf_counter(), 0.0, 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_factor(step, steps, kind="cosine", warmup=max(1, round(0.05 * steps)), final=0.05)
            student.begin_step(seed, step)
            ids, labels = self.text.batch(self.rows, 1000 + seed, step)
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                output = student(ids, labels=labels)
            ((output.loss_sum + output.z_loss_sum) / output.token_count).backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            if step == 3:  # kernels have been built
                float(output.loss_sum.detach())
                warm = time.perf_counter() - began
            if step + 1 in marks:
                before = time.perf_counter()
                row["held_out"].append([(step + 1) * a_step, round(self.held_out(student), 4)])
                spent += time.perf_counter() - before
            if ends() and step + 1 < steps:
                row["cut_at"] = (step + 1) * a_step
                break
        seconds = time.perf_counter() - began - spent - warm
        row["tokens_per_second"] = round(max(1, step - 3) * a_step / seconds)
        return row


def teacher_of(folder: Path, device: torch.device) -> LanguageModel:
    """The model of a folder that model=hf: reads, or of a run; a stock one is not compared with transformers' again."""
    if not is_foreign(folder):
        return load_model(folder, device)[0].requires_grad_(False)
    config, tensors = read_stock(folder, verify=False)
    model = LanguageModel(config)
    model.load_state_dict(tensors, strict=False)
    return model.to(device).eval().requires_grad_(False)


def check_tokens(teacher: Path, text: Text) -> None:
    """Raises UserError where the shards are of another tokenizer."""
    theirs = Tokenizer.from_file(str(teacher / "tokenizer.json")).get_vocab() if (teacher / "tokenizer.json").exists() else None
    ours = Tokenizer.from_file(str(text.train_set.directory / "tokenizer.json")).get_vocab()
    if theirs is not None and theirs != ours:
        raise UserError(f"the shards have other tokens than the teacher; prepare them with tokenizer={teacher}.")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default="mamba2,delta,paragru")
    parser.add_argument("--starts", default="copied,anew")
    parser.add_argument("--rates", default="1e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of a run")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128, help="of held-out text")
    parser.add_argument("--kl", type=float, default=0.8, help="share of the steps that learn from the teacher")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    given = parser.parse_args(arguments)
    refuse(parser, given, ["seeds", "tokens", "rows", "length", "windows"], {"starts": ("copied", "anew"), "targets": targets()})
    try:
        rates = [float(rate) for rate in given.rates.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < 1 for rate in rates) or not 0 <= given.kl <= 1:
        parser.error(f"--rates are numbers above zero with commas between them, and --kl is a share; not {given.rates!r} and {given.kl}.")
    try:
        text = Text(given.data, given.length, device := device_of(given.device))
        check_tokens(given.teacher, text)
        conversion = Conversion(teacher_of(given.teacher, device), text, given.rows, given.windows, given.kl)
    except UserError as error:
        sys.exit(str(error))
    taught = conversion.held_out(conversion.teacher)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "data", "device", "teacher")}
    results: dict[str, Any] = {
        "settings": settings,
        "device": name,
        "environment": environment(device),
        "teacher": round(taught, 4),
        "runs": [],
    }
    print(f"teacher {taught:.4f} nats", flush=True)
    every = itertools.product(range(given.seeds), given.targets.split(","), given.starts.split(","), rates)
    for seed, target, start, rate in every:
        results["runs"].append(row := conversion.run(target, start, rate, seed, given.tokens))
        print(f"{target:8} {start:6} {rate:g} seed {seed}: " + "  ".join(f"{n:,} {nats:.3f}" for n, nats in row["held_out"]), flush=True)
        write_json(given.out, results)


if __name__ == "__main__":
    main()
