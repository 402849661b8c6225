"""The command line of train.py: Hydra overrides in, a checked Config out, every mistake in a sentence and exit status 2.

Hydra stops at the first problem it meets and phrases it for programmers, so the overrides are looked at here first, all of them.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from data.fields import nearest
from kernels.interrupts import INTERRUPTED
from training.config import suggest
from training.config.arguments import ready
from training.config.checks import check
from training.config.groups import CONFIG_DIR, config_groups
from training.config.schema import Config, schema_keys
from training.errors import FILES, FULL, RIGHTS, UserError, sentence_of
from training.launch import first_here, launch, world_size


def _group_problems(overrides: list[Override], groups: dict[str, list[str]]) -> list[str]:
    problems = []
    for item in overrides:
        group, chosen = item.key_or_group.split("@")[0], item.value()
        if item.is_delete() or item.is_sweep_override() or group not in groups:
            continue
        for value in [str(one) for one in chosen] if isinstance(chosen, list) else [(item.input_line or "").partition("=")[2].strip("'\"")]:
            if value in groups[group]:
                continue
            near = suggest.option(group, value, groups[group])
            choice = f"choose one of {', '.join(groups[group])}."
            problems.append(
                f"{group}={value}: there is no configs/{group}/{value}.yaml; {near}{(' Or ' if near.endswith('?') else ', or ') if near else ''}{choice}"
            )
    return problems


def _brings_keys(item: Override) -> bool:
    return item.is_add() or item.is_force_add() or item.is_hydra_override()


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
PLAIN = re.compile(r"[\w./:~+%@-]([\w ./:~+%@-]*[\w./:~+%@-])?", re.ASCII)  # of a name or path
FOLDER = re.compile(r"(['\"]?)hf:(.*)\1")
QUOTE, DOUBLE = "'", '"'
NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d+)(e[+-]?\d+)?|nan|inf|true|false", re.IGNORECASE)


def _unquoted(value: str) -> bool:
    """Whether a value is a name or path that Hydra takes in quotes only: with other letters, of a home, or with an equals sign, as folders of sweeps
    have. An equals sign behind a blank is one of the next argument, whose quotes are wrong."""
    letters = re.sub(r"[^\x00-\x7f]" if " " in value else r"[^\x00-\x7f]|=", "x", value)
    return (letters != value or value.startswith("~/")) and PLAIN.fullmatch(letters.removeprefix("~/")) is not None


def _weights(argument: str, value: str) -> str:
    """A mixture as YAML has it, whose folders may have any name, in words that Hydra and OmegaConf read; '' where Hydra reads it as it is, or where it
    is none."""
    try:
        OverridesParser.create().parse_overrides([argument])
        return ""
    except HydraException:
        pass
    try:
        weights = yaml.safe_load(value)
    except yaml.YAMLError:
        return ""
    if not isinstance(weights, dict) or not all(isinstance(weight, (int, float)) for weight in weights.values()):
        return ""
    return f'${{oc.create:"{suggest.escaped(json.dumps(weights), DOUBLE)}"}}'


def spelled_out(arguments: list[str]) -> list[str]:
    """Arguments as Hydra takes them: `model=hf:PATH` is the transformer's training settings and everything else from the folder; what a key for
    text gets is text, numbers too (`name=1e3`), in any language (`run_dir=/home/jürgen/run`), and of a sweep (`train.start_from=runs/x/seed=1`); so are
    the folders of a mixture."""
    spelled = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if argument == "experiment=null":  # the default is no experiment, and Hydra refuses null for a group
            continue
        if key == "model" and (folder := FOLDER.fullmatch(value)):
            path = os.path.expanduser(folder[2]).replace("\\", "\\\\").replace("'", "\\'")
            spelled += ["model=transformer", f"+model.init_from='{path}'", "+model.verify=true"]
        elif key in TEXTS and (NUMBER.fullmatch(value) or _unquoted(value)):
            spelled.append(f"{key}='{value}'")
        elif key == "data.path" and value.startswith("{") and (weights := _weights(argument, value)):
            spelled.append(f"{key}='{suggest.escaped(weights, QUOTE)}'")
        else:
            spelled.append(argument)
    return spelled


def unreadable_yaml(error: yaml.YAMLError | UnicodeDecodeError, config_dir: Path) -> str:
    """The sentence for a file of ours or of the user's that is no YAML."""
    if isinstance(error, UnicodeDecodeError):
        return f"A config file is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8."
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = getattr(error, "problem", None) or " ".join(str(error).split())
    if mark is None:
        return f"A config file is not YAML: {reason}."
    file = Path(str(mark.name))
    shown = file.relative_to(config_dir.parent) if file.is_relative_to(config_dir.parent) else file
    return f"{shown} is not YAML: line {mark.line + 1}, column {mark.column + 1}: {reason}."


def compose_config(
    arguments: list[str], config_dir: Path = CONFIG_DIR, extra: Path | None = None, name: str = "train", with_hydra: bool = False
) -> DictConfig:
    """The composed configuration `name` of `arguments`. extra: a folder of more configs; with_hydra: Hydra's own settings too, under `hydra`. Raises
    UserError naming every override that does not fit."""
    groups, arguments = config_groups(config_dir), spelled_out(arguments)
    if extra is not None:
        if not extra.is_dir():
            raise UserError(f"There is no folder {extra}; --config-dir takes one that holds configs as configs/ does.")
        for group, options in config_groups(extra).items():
            groups[group] = [*groups.get(group, []), *options]
        arguments = [f"hydra.searchpath=['file://{extra.resolve()}']", *arguments]
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
            return compose(name, arguments, return_hydra_config=with_hydra)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(unreadable_yaml(error, config_dir)) from error
        except (
            HydraException,
            OmegaConfBaseException,
        ) as error:  # Hydra names only the first problem: look for keys that do not exist as well
            first = error
        try:
            base = compose(name, [o.input_line or "" for o, g in zip(overrides, is_group) if g or _brings_keys(o)])
        except (HydraException, OmegaConfBaseException) as error:
            first = error
        else:
            problems += _key_problems([o for o, g in zip(overrides, is_group) if not g and not o.is_hydra_override()], base, groups)
        no_keys = re.match(r"In '([^']+)': .*Cannot merge DictConfig with ListConfig", " ".join(str(first).split()))
        told = f"The file of {no_keys[1]} holds a list; settings are written 'key: value', a line each." if no_keys else str(first)
        raise UserError(problems or " ".join(told.split())) from first


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
    if "experiment" in mapping:
        raise UserError(
            "The file of this experiment has to begin with the line '# @package _global_', so that its keys are those of the run."
        )
    return check({str(k): v for k, v in mapping.items()}, world_size=world_size())


def resolved_yaml(composed: DictConfig, config: Config) -> str:
    """All settings of a run as YAML, with what the check has settled."""
    settled = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
    OmegaConf.update(settled, "optim.lr", config.peak_lr)
    return OmegaConf.to_yaml(settled)


def report(error: UserError | ValueError) -> None:
    """Prints the sentences of an error on stderr, once on each machine."""
    if first_here():
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)


def refused(error: OSError) -> bool:
    """Whether the operating system does not let this user write or open files, which another try does not change."""
    return error.errno in RIGHTS + FULL + FILES


def in_sweep() -> bool:
    """Whether Hydra runs a job of `python train.py -m` here."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def run(main: Callable[..., Any]) -> int:
    """Runs the Hydra entry point after all overrides have been checked. Returns the exit status."""
    sys.argv[1:] = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    sys.argv[1:] = spelled_out(sys.argv[1:])
    try:
        ready(sys.argv[1:])
        launch()
        return _run(main)
    except UserError as error:
        report(error)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        report(UserError(sentence_of(error)))
        return 2
    except KeyboardInterrupt:  # before training has begun; later it saves first
        if first_here():
            print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def flags_of(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(Hydra's flags as it reads them, their words); they may stand anywhere. Raises UserError for others."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; python train.py --help shows what there is.")

    parser.error = refuse  # type: ignore[method-assign]
    asked, unknown = parser.parse_known_intermixed_args(words)
    unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        flags = sorted(flag for action in parser._actions for flag in action.option_strings if flag.startswith("--"))
        raise UserError([f"Unknown flag {word!r}; {_instead(word, flags)}" for word in unknown])
    return asked, [word for word in words if word not in asked.overrides]


def _instead(word: str, flags: list[str]) -> str:
    close = difflib.get_close_matches(word, flags, n=1, cutoff=0.75)
    if close and "=" not in word:
        return f"did you mean {close[0]}?"
    plain = word.lstrip("-")
    return f"settings are written without dashes: {plain if '=' in plain else plain + '=VALUE'}."


# what a run would have of Hydra's main beyond a composed config; the values of configs/train.yaml and Hydra's own
OF_HYDRA: dict[str, Any] = {"mode": None, "callbacks": {}, "output_subdir": None, "run.dir": ".", "job.chdir": None, "job.env_set": {}}


def _needs_hydra(words: list[str], hydra: DictConfig) -> bool:
    """Whether a run asks for anything that Hydra's main does and train.py does not: by a word of its command line, or in a file."""
    return any("hydra" in word.partition("=")[0] for word in words) or any(OmegaConf.select(hydra, k) != v for k, v in OF_HYDRA.items())


def _trained(main: Callable[[DictConfig], Any], config: DictConfig, hydra: DictConfig) -> int:
    """Runs what was checked, which Hydra's main would compose twice more. An exception that is no mistake of the user's keeps its traceback."""
    configure_log(hydra.job_logging, hydra.verbose)
    try:
        main(config)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run(main: Callable[..., Any]) -> int:
    asked, flags = flags_of(sys.argv[1:])
    sys.argv[1:] = [*asked.overrides, *flags]
    modes = [flag for flag in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(asked, flag)]
    if len(modes) > 1:
        raise UserError(f"Give one of {' and '.join('--' + mode.replace('_', '-') for mode in modes)}, not both.")
    if asked.resolve and not (asked.cfg or asked.help):
        raise UserError("--resolve goes with --cfg job, which shows the settings instead of training.")
    if asked.hydra_help:
        main()
    extra = Path(asked.config_dir) if asked.config_dir else None

    def composed(overrides: list[str], with_hydra: bool = False) -> DictConfig:
        configs = CONFIG_DIR if asked.config_path is None else Path(asked.config_path)
        return compose_config(overrides, configs, extra, asked.config_name or "train", with_hydra)

    if asked.help:
        from training.config.help import help_text

        composed(asked.overrides)
        print(help_text(asked.overrides, [*([extra.resolve()] if extra else []), CONFIG_DIR]))
        return 0
    if asked.multirun or "hydra.mode=MULTIRUN" in asked.overrides:
        from training.sweep import Sweep

        return Sweep(asked.overrides, flags, composed, checked).run(main)
    config = composed(asked.overrides, with_hydra=True)
    with open_dict(config):
        hydra = config.pop("hydra")
    if not (asked.cfg or asked.info or asked.shell_completion):
        checked(config)
    GlobalHydra.instance().clear()
    if not flags and not _needs_hydra(asked.overrides, hydra):
        return _trained(main, config, hydra)
    main()
    return 0
