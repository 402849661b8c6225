"""What a person may have meant: for a key that is nested elsewhere or called otherwise here, for an option of a group, for text that needs quotes."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any

ELSEWHERE = {  # names of other programs
    "batch_size": "train.global_batch",
    "global_batch_size": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "peak_lr": "optim.lr",
    "min_lr": "schedule.final",
    "wd": "optim.weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "clip": "train.grad_clip",
    "max_grad_norm": "train.grad_clip",
    "gradient_clipping": "train.grad_clip",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "iterations": "train.steps",
    "epochs": "train.tokens",
    "num_epochs": "train.tokens",
    "num_train_epochs": "train.tokens",
    "max_tokens": "train.tokens",
    "context_length": "train.seq_len",
    "block_size": "train.seq_len",
    "sequence_length": "train.seq_len",
    "max_length": "train.seq_len",
    "seq_length": "train.seq_len",
    "warmup_steps": "schedule.warmup",
    "warmup_ratio": "schedule.warmup",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "recompute": "train.activation_checkpointing",
    "output_dir": "run_dir",
    "out": "run_dir",
    "out_dir": "run_dir",
    "run_name": "name",
    "data_path": "data.path",
    "data_dir": "data.path",
    "dataset": "data.path",
    "input": "data.path",
    "save_every": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "eval_steps": "eval.every",
    "eval_interval": "eval.every",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "resume_from_checkpoint": "train.resume",
    "init_from": "train.start_from",
    "zero": "deepspeed",
    "zero_stage": "deepspeed.stage",
    "tensor_parallel": "parallel.sequence",
    "heads": "model.mixers.attention.n_heads",
    "layers": "size.n_layers",
    "n_layer": "size.n_layers",
    "num_layers": "size.n_layers",
    "num_hidden_layers": "size.n_layers",
    "hidden_size": "size.d_model",
    "n_embd": "size.d_model",
    "width": "size.d_model",
    "num_heads": "size.n_heads",
    "n_head": "size.n_heads",
    "optimizer": "optim",
    "scheduler": "schedule",
    "lr_scheduler": "schedule",
    "lr_schedule": "schedule",
    "architecture": "model",
    "arch": "model",
}
PREFERRED = ("train.", "optim.", "size.", "model.")  # where several places have the name


def key(wrong: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for a dotted key that does not exist: the same name at another place, another program's name, or a near miss; else ''."""
    names = sorted(
        known, key=lambda name: (next((i for i, p in enumerate(PREFERRED) if name.startswith(p)), len(PREFERRED)), name.count("."), name)
    )
    last = wrong.split(".")[-1].replace("-", "_").lower()
    if last == "name" and "." in wrong:  # of whatever it may be
        return ""
    same = [name for name in names if name.split(".")[-1] == last and name != wrong]
    if not same:
        same = [name for name in [ELSEWHERE.get(last, "")] if name in names]
    if not same:
        same = [name for name in names if name.split(".")[-1].replace("_", "") == last.replace("_", "")]
    if not same:
        same = difflib.get_close_matches(wrong, names, n=1, cutoff=0.75)
    if not same:
        leaves = {name.split(".")[-1]: name for name in reversed(names)}
        same = [leaves[leaf] for leaf in difflib.get_close_matches(last, list(leaves), n=1, cutoff=0.8)]
    return f"did you mean {' or '.join(repr(name) for name in same[:3])}?" if same else ""


def option(group: str, wrong: str, options: list[str]) -> str:
    """What to write for an option of `group` that does not exist; '' where nothing is near."""
    if group == "data" and ("/" in wrong or wrong.startswith(".")):
        return f"for a folder of token shards write data=shards {quoted('data.path', wrong)}"
    if group == "model" and "/" in wrong:
        return f"for weights write model=hf:FOLDER (a Hugging Face folder) or {quoted('train.start_from', wrong)} (a checkpoint of this program)"
    lowered = {name.lower(): name for name in options}
    last = {name.split("/")[-1]: name for name in options}
    near = lowered.get(wrong.lower()) or last.get(wrong) or lowered.get(f"{group.replace('deepspeed', 'zero')}{wrong}".lower())
    longer = [name for name in options if name.startswith(wrong)]
    if len(longer) > 1 and not near:
        return f"did you mean one of the {len(longer)} that begin with it, such as {group}={longer[0]}?"
    near = near or next(iter(difflib.get_close_matches(wrong, options, n=1)), None)
    near = near or next((last[name] for name in difflib.get_close_matches(wrong, list(last), n=1)), None)
    near = near or next((name for name in options if name.startswith(wrong) or wrong.startswith(name)), None)
    return f"did you mean {group}={near}?" if near else ""


def quoted(name: str, value: str) -> str:
    """`name=value` as a shell and then Hydra read it as text: quoted twice where it has to be."""
    if value.isascii() and re.fullmatch(r"[\w/.-]+", value):
        return f"{name}={value}"
    text = escaped(value, '"')
    return shlex.quote(f'{name}="{text}"')


def escaped(text: str, quote: str) -> str:
    """What stands between two quotes for `text`, as Hydra and OmegaConf read it: they leave backslashes alone but for those before a quote."""
    return re.sub(r"(\\+)$", r"\1\1", re.sub(rf"(\\*){quote}", lambda found: f"{found[1]}{found[1]}\\{quote}", text))


def unreadable(argument: str, reads: Callable[[str], Any]) -> str:
    """A sentence for an argument that Hydra's grammar does not take; `reads(argument)` tells whether it takes another, or raises."""
    name, equals, value = argument.partition("=")
    if not equals:
        return f"Cannot read the argument {argument!r}; write key=value."
    if not re.fullmatch(r"(\+\+?|~)?[\w@/.-]+", name) or ".." in name:
        mended = re.sub(r"[^\w@/-]+", ".", name).strip(".") or "key"
        return f"Cannot read the argument {argument!r}; write {mended}={value.strip() or 'VALUE'}, without spaces and with single dots in the key."
    if name == "data.path" and value.startswith("{"):
        return f"Cannot read the argument {argument!r}; a mixture is written '{name}={{a: 1, b: 2}}', with a space behind each colon."
    text = quoted(name, value)
    try:
        reads(shlex.split(text)[0])
    except Exception:
        return f"Cannot read the argument {argument!r}; write key=value, and quote lists: 'key=[a,b]'."
    lists = "a list is written 'key=[a,b]', a group 'key={a: 1}', and " if value[:1] in ("[", "{") else ""
    return f"Cannot read the argument {argument!r}; {lists}text with such signs needs quotes inside the shell's: {text}"
