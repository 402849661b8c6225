"""The mixers that configs/mixer describes, as a run is given them, and the one that a newcomer adds."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from models import mixers

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def mixer_configs() -> dict[str, dict[str, Any]]:
    """{name of the file: its keys, with those of the files that it begins from}."""
    return copy.deepcopy(composed_mixers())


@functools.cache
def composed_mixers() -> dict[str, dict[str, Any]]:
    """Once a process: Hydra takes seconds for all of them, and many test files ask."""
    with initialize_config_dir(version_base=None, config_dir=str(FOLDER)):
        composed = {path.stem: compose(f"mixer/{path.stem}") for path in sorted((FOLDER / "mixer").glob("*.yaml"))}
    return {name: OmegaConf.to_container(config.mixer) for name, config in composed.items()}  # type: ignore[misc]


NEW_MIXER = Path(__file__).resolve().parent / "models" / "new_mixer"  # the file and the config that somebody adds to the project


@contextmanager
def with_new_mixer() -> Iterator[dict[str, Any]]:
    """Inside, the new file lies among those of models/mixers; yields what its config says."""
    mixers.__path__.append(str(NEW_MIXER))
    importlib.invalidate_caches()
    try:
        yield yaml.safe_load((NEW_MIXER / "configs" / "mixer" / "moving_average.yaml").read_text())
    finally:
        mixers.__path__.remove(str(NEW_MIXER))
        sys.modules.pop("models.mixers.moving_average", None)
