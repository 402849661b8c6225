"""The command line of train.py: Hydra overrides in, a checked Config out, every mistake in a sentence and exit status 2.

Hydra stops at the first problem it meets and phrases it for programmers, so the overrides are looked at here first, all of them.
"""

from __future__ import annotations

import os
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
from omegaconf.errors import OmegaConfBaseException

from training.config import Config, check, nearest
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
        group, value = item.key_or_group.split("@")[0], item.value()
        if group in groups and isinstance(value, (str, int)) and str(value) not in groups[group]:
            problems.append(f"{group}={value}: there is no configs/{group}/{value}.yaml; choose one of {', '.join(groups[group])}.")
    return problems


def _key_problems(overrides: list[Override], base: DictConfig) -> list[str]:
    problems = []
    for item in overrides:
        if item.is_add() or item.is_force_add() or item.is_delete():
            continue
        node: Any = base
        parts = item.key_or_group.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, DictConfig) or part not in list(node.keys()):
                known = [str(k) for k in node] if isinstance(node, DictConfig) else []
                problems.append(f"Unknown key {'.'.join(parts[: depth + 1])!r}; {nearest(part, known)}")
                break
            node = node._get_node(part)
            if isinstance(node, DictConfig) and node._is_interpolation():
                node = node._maybe_dereference_node()
    return problems


def spelled_out(arguments: list[str]) -> list[str]:
    """`model=hf:PATH` as Hydra takes it: the transformer's training settings, everything else from the folder."""
    found = []
    for argument in arguments:
        if argument.startswith("model=hf:"):
            path = argument.removeprefix("model=hf:").replace("\\", "\\\\").replace("'", "\\'")
            found += ["model=transformer", f"+model.init_from='{path}'", "+model.verify=true"]
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
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException:
            problems.append(f"Cannot read the argument {argument!r}; write key=value, and quote lists: 'key=[a,b]'.")
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
            problems += _key_problems([o for o, g in zip(overrides, is_group) if not g], base)
        raise UserError(problems or " ".join(str(first).split())) from first


def checked(config: DictConfig) -> Config:
    """A Config from a composed DictConfig. Raises UserError with all problems."""
    try:
        mapping = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(" ".join(str(error).split())) from error
    assert isinstance(mapping, dict)
    return check({str(k): v for k, v in mapping.items()}, world_size=int(os.environ.get("WORLD_SIZE", "1")))


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
        if plain:
            checked(compose_config(overrides))
            GlobalHydra.instance().clear()
        main()
    except UserError as error:
        report(error)
        return 2
    return 0
