"""The groups of configs on disk: configs/GROUP/OPTION.yaml."""

from __future__ import annotations

from pathlib import Path

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


def config_groups(root: Path = CONFIG_DIR) -> dict[str, list[str]]:
    """Every config group on disk with its options; those in a folder of their own are options 'FOLDER/NAME' of the group above."""
    groups: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        if file.parent != root:
            group, *rest = file.relative_to(root).with_suffix("").parts
            groups.setdefault(group, []).append("/".join(rest))
    return groups
