"""The command line of train.py: Hydra overrides in, a checked Config out, every mistake in a sentence and exit status 2.

Hydra stops at the first problem it meets and phrases it for programmers, so the overrides are looked at here first, all of them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from training import suggest
from training.config import Config, check, nearest, schema_keys
from training.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


def config_groups(root: Path = CONFIG_DIR) -> dict[str, list[str]]:
    """Every config group on disk with its options; those in a folder of their own are options 'FOLDER/NAME' of the group above."""
    groups: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        if file.parent != root:
            group, *rest = file.relative_to(root).with_suffix("").parts
            groups.setdefault(group, []).append("/".join(rest))
    return groups


def _group_problems(overrides: list[Override], groups: dict[str, list[str]]) -> list[str]:
    problems = []
    for item in overrides:
        group, given = item.key_or_group.split("@")[0], item.value()
        if item.is_delete() or item.is_sweep_override() or group not in groups:
            continue
        for value in [str(one) for one in given] if isinstance(given, list) else [(item.input_line or "").partition("=")[2].strip("'\"")]:
            if value in groups[group]:
                continue
            near = suggest.option(group, value, groups[group])
            choice = f"choose one of {', '.join(groups[group])}."
            problems.append(f"{group}={value}: there is no configs/{group}/{value}.yaml; {near}{(' Or ' if near.endswith('?') else ', or ') if near else ''}{choice}")
    return problems


def _sweep_problems(overrides: list[Override]) -> list[str]:
    """Values with commas outside of brackets, which Hydra takes for several runs (-m)."""
    problems = []
    for item in overrides:
        if item.is_sweep_override():
            name, _, value = (item.input_line or "").partition("=")
            means = f"a list is written '{name}=[{value}]', one text {suggest.quoted(name, value)}"
            if name == "data.path":
                means = f"a mixture is written '{name}={{{', '.join(f'{folder}: 1' for folder in value.split(','))}}}'"
            problems.append(f"{item.input_line!r} gives several values; {means}, and several runs take -m before it.")
    return problems


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return [prefix[:-1]]
    if node._is_interpolation():
        return [prefix[:-1]]
    return [name for key in map(str, node) for name in _leaves(node._get_node(key), f"{prefix}{key}.")]


def _key_problems(overrides: list[Override], base: DictConfig, groups: dict[str, list[str]]) -> list[str]:
    problems = []
    known_keys = [*_leaves(base), *groups]
    for item in overrides:
        if item.is_add() or item.is_force_add() or item.is_delete():
            continue
        node: Any = base
        parts = item.key_or_group.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, DictConfig) or part not in list(node.keys()):
                known = [str(k) for k in node] if isinstance(node, DictConfig) else []
                advice = nearest(part, known, 0.8) if known else f"{'.'.join(parts[:depth])} is a value and has no keys."
                if not advice.startswith("did"):
                    advice = suggest.key(item.key_or_group, known_keys) or (nearest(part, known) if known else advice)
                problems.append(f"Unknown key {'.'.join(parts[: depth + 1])!r}; {advice}")
                break
            node = node._get_node(part)
            if isinstance(node, DictConfig) and node._is_interpolation():
                node = node._maybe_dereference_node()
    return problems


TEXTS = {*(key for key in schema_keys(Config, kind=str)), "data.path"}
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d+)(e[+-]?\d+)?|nan|inf|true|false", re.IGNORECASE)


def spelled_out(arguments: list[str]) -> list[str]:
    """Arguments as Hydra takes them: `model=hf:PATH` is the transformer's training settings and everything else from the folder; what a key for
    text gets is text, numbers too (`name=1e3`)."""
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument == "experiment=null":  # none is what there is without it, and Hydra takes no null for a group
            continue
        if argument.startswith("model=hf:"):
            path = os.path.expanduser(argument.removeprefix("model=hf:")).replace("\\", "\\\\").replace("'", "\\'")
            found += ["model=transformer", f"+model.init_from='{path}'"]
        elif key in TEXTS and NUMBER.fullmatch(value):
            found.append(f"{key}='{value}'")
        else:
            found.append(argument)
    return found


def compose_config(arguments: list[str], config_dir: Path = CONFIG_DIR) -> DictConfig:
    """The composed configuration of `arguments`. Raises UserError naming every override that does not fit."""
    groups, arguments = config_groups(config_dir), spelled_out(arguments)
    problems: list[str] = []
    overrides: list[Override] = []
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_overrides([argument])
            if not all(item.key_or_group for item in parsed):
                raise HydraException("no key")
            overrides += parsed
        except HydraException:
            problems.append(suggest.unreadable(argument, lambda text: OverridesParser.create().parse_overrides([text])))
    problems += _sweep_problems(overrides)
    if any(argument == "+model.init_from=''" for argument in arguments):
        problems.append("model=hf: names no folder; write model=hf:FOLDER.")
    is_group = [item.key_or_group.split("@")[0] in groups for item in overrides]
    problems += _group_problems([o for o, g in zip(overrides, is_group) if g], groups)
    if problems:
        raise UserError(problems)
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base=None, config_dir=str(config_dir)):
        try:
            return compose("train", arguments)
        except (HydraException, OmegaConfBaseException) as error:  # of the first problem; are there keys that do not exist?
            first = error
        try:
            base = compose("train", [o.input_line or "" for o, g in zip(overrides, is_group) if g or o.is_add() or o.is_force_add()])
        except (HydraException, OmegaConfBaseException) as error:
            first = error
        else:
            problems += _key_problems([o for o, g in zip(overrides, is_group) if not g], base, groups)
        raise UserError(problems or " ".join(str(first).split())) from first


def checked(config: DictConfig) -> Config:
    """A Config from a composed DictConfig. Raises UserError with all problems."""
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError([f"{key} is not given; write {key}=VALUE." for key in missing])
        mapping = OmegaConf.to_container(config, resolve=True)
    except InterpolationKeyError as error:
        raise UserError(f"{error.full_key} refers to a key that does not exist; for a dollar sign itself write \\${{...}}.") from error
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error
    assert isinstance(mapping, dict)
    return check({str(k): v for k, v in mapping.items()}, world_size=int(os.environ.get("WORLD_SIZE", "1")))


def resolved_yaml(composed: DictConfig, config: Config) -> str:
    """All settings of a run as YAML, with what the check has settled."""
    settled = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    OmegaConf.update(settled, "optim.lr", config.peak_lr)
    return OmegaConf.to_yaml(settled)


HYDRA_FLAGS = (
    "help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion", "config-path", "config-name",
    "config-dir", "experimental-rerun", "info",
)  # fmt: skip


def _dashed(words: list[str]) -> list[str]:
    """A sentence for every `--key=value`, which other programs take."""
    wrong = [w for w in words if w.startswith("--") and w[2:].partition("=")[0] not in HYDRA_FLAGS]
    return [f"Cannot use {w!r}; settings are written key=value, without dashes (flags: --help, --cfg job, -m)." for w in wrong]


def report(error: UserError | ValueError) -> None:
    """Prints the sentences of an error on stderr, once on each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)


def run(main: Callable[[], Any]) -> int:
    """Runs the Hydra entry point after all overrides have been checked. Returns the exit status."""
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    sys.argv[1:] = spelled_out(sys.argv[1:])
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    plain = len(overrides) == len(sys.argv) - 1  # flags such as --help, --cfg and --multirun are Hydra's own business
    try:
        dashed = _dashed(sys.argv[1:])
        if dashed:
            raise UserError(dashed)
        if plain:
            checked(compose_config(overrides))
            GlobalHydra.instance().clear()
        main()
    except UserError as error:
        report(error)
        return 2
    return 0
