"""A push through huggingface_hub's own client to a server that speaks the Hub's protocol: whole, cut off and taken up, and refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.hub.push import check_name
from tests.conftest import ROOT, environment, run_program
from tests.hub.hub_server import Hub
from training.errors import UserError

SHORT_WAITS = (
    "import sys, time; wait = time.sleep; time.sleep = lambda s: wait(min(s, 0.02)); from scripts.push import main; sys.exit(main())"
)


def push(hub: Hub, folder: Path, name: str, token: str | None = "right") -> subprocess.CompletedProcess[str]:
    home = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    settings = {k: v for k, v in environment(**home).items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    if token:
        settings["HF_TOKEN"] = token
    command = [sys.executable, "-c", SHORT_WAITS, str(folder), name]  # the client waits half a minute between its tries
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=120, check=False)


def test_push_whole_interrupted_and_refused(tmp_path: Path) -> None:
    folder, hub = tmp_path / "out", Hub("right")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("# a model\n")
    for i in range(3):
        save_file({"x": torch.full((7, 11), float(i))}, folder / f"model-0000{i + 1}-of-00003.safetensors")
    early = run_program(
        ["-m", "scripts.export", str(folder), str(tmp_path / "x"), "--push", "org/x"], HF_TOKEN="", HF_HOME=str(tmp_path / "none")
    )
    assert early.returncode == 2 and "no Hub token" in early.stderr  # before anything is exported
    for token, name, part in ((None, "org/tiny", "no Hub token"), ("wrong", "org/tiny", "write access"), ("right", "tiny", "org/name")):
        refused = push(hub, folder, name, token)
        assert refused.returncode == 2 and part in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
        assert refused.stderr.strip().splitlines()[-1].startswith("error: ")
    hub.drop_after = 1
    cut = push(hub, folder, "org/tiny")
    assert cut.returncode == 2 and f"scripts.push {folder} org/" in cut.stderr, cut.stderr
    assert hub.repositories == {"org/tiny": {}} and len(hub.blobs) == 1
    hub.drop_after = None
    done = push(hub, folder, "org/tiny")
    assert done.returncode == 0 and "pushed: " in done.stdout, done.stderr
    assert hub.uploads == 3  # what had arrived was not sent again
    assert hub.repositories["org/tiny"] == {p.name: p.read_bytes() for p in folder.iterdir()}
    hub.shutdown()


def test_a_large_file_goes_in_parts_and_is_taken_up(tmp_path: Path) -> None:
    folder, hub = tmp_path / "out", Hub("right")
    hub.part_size = 100_000
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"x": torch.rand(90_000)}, folder / "model.safetensors")
    hub.drop_after = 2
    cut = push(hub, folder, "org/large")
    assert cut.returncode == 2 and f"scripts.push {folder} org/" in cut.stderr, cut.stderr
    assert hub.repositories == {"org/large": {}} and not hub.blobs
    hub.drop_after = None
    done = push(hub, folder, "org/large")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["org/large"] == {p.name: p.read_bytes() for p in folder.iterdir()} and len(hub.parts) == 1
    hub.shutdown()


@pytest.mark.parametrize("name", ["", "tiny", "a/b/c", "org/", "org/a b", "org/na--me", "../x", "org/x.git"])
def test_a_wrong_name_is_a_sentence(name: str) -> None:
    with pytest.raises(UserError, match="org/name"):
        check_name(name)
