"""`python train.py --help`: every key with its present value and, from the YAML files, what it means."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from training.config.groups import config_groups

COLUMN = 50  # where comments start
COMMENT = re.compile(r"\s#\s*(.*)$")


def comments_of(text: str) -> dict[str, str]:
    """The comment behind each key of a YAML document, by the key's path ('train.seq_len')."""
    comments: dict[str, str] = {}
    lines = text.splitlines()

    def walk(node: Any, path: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            where = f"{path}.{key.value}" if path else str(key.value)
            mark = value.end_mark if isinstance(value, yaml.ScalarNode) and value.style not in ("|", ">") else key.end_mark
            if match := COMMENT.search(lines[mark.line], mark.column):
                comments[where] = match[1].strip()
            walk(value, where)

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return comments


def meanings(overrides: list[str], folders: list[Path]) -> dict[str, str]:
    """The comment on each key, by its dotted path, from the YAML files that `overrides` select; a later file's comment replaces an earlier
    one's. folders: where configs are looked for; the first that has the file is read."""
    defaults = GlobalHydra.instance().config_loader().compute_defaults_list("train", overrides, RunMode.RUN)
    by_key: dict[str, str] = {}
    for entry in defaults.defaults:
        file = next((f / f"{entry.config_path}.yaml" for f in folders if (f / f"{entry.config_path}.yaml").is_file()), None)
        if file is not None and not entry.config_path.startswith("hydra"):
            prefix = f"{entry.package}." if entry.package else ""
            by_key |= {prefix + key: comment for key, comment in comments_of(file.read_text(encoding="utf-8")).items()}
    return by_key


def commented(config: DictConfig, notes: dict[str, str]) -> str:
    """The config as YAML, with the notes behind the keys they belong to."""
    lines: list[str] = []
    path: list[str] = []
    for line in OmegaConf.to_yaml(config).splitlines():
        match = re.match(r"( *)([^\s:#'\"-][^:]*):( |$)", line)
        if match:
            depth = len(match[1]) // 2
            path[depth:] = [match[2]]
            if (note := notes.get(".".join(path))) is not None:
                line = f"{line:<{COLUMN}}  # {note}"
        lines.append(line)
    return "\n".join(lines)


def help_text(overrides: list[str], folders: list[Path]) -> str:
    """The page of --help for the config that `overrides` make. folders: where configs lie, the own one last."""
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[{','.join(repr(f'file://{folder}') for folder in folders[:-1])}]"] if folders[:-1] else []
    with initialize_config_dir(version_base=None, config_dir=str(folders[-1])):
        whole = compose("train", [*search, *overrides], return_hydra_config=True)
        notes = meanings([*search, *overrides], folders)
        template = whole.hydra.help.template
    groups: dict[str, list[str]] = {}
    for folder in reversed(folders):
        for name, options in config_groups(folder).items():
            groups[name] = [*groups.get(name, []), *options]
    shown = "\n".join(f"  {name}: {', '.join(options)}" for name, options in groups.items())
    settings = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    return Template(template).safe_substitute(APP_CONFIG_GROUPS=shown, CONFIG=commented(settings, notes))
