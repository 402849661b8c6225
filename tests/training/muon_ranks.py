"""Work of several ranks in one process each, for test_muon.py: python -m tests.training.muon_ranks SHARDS FOLDER save|load RANKS...

save: two steps with Muon, a checkpoint and the whole state, the losses of these and two more steps, and what each rank owns.
load: the checkpoints that RANKS wrote, compared with that state, and the losses of two steps from there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from kernels.tensor_lists.reference import pieces
from tests.training.reshape import Run
from training import checkpoint
from training.optim import MuonWithAdamW
from training.saving.saver import Saver
from training.world import World, start_distributed
from training.zero.local_state import MOMENTS

WORDS = ("optim=muon", "optim.muon_lr=0.02")


def whole(run: Run) -> dict[str, torch.Tensor]:
    """Weights, moments and momentum of all ranks."""
    optimizer, found = run.engine.optimizer, {}
    assert isinstance(optimizer, MuonWithAdamW)
    for name, p in run.engine.parameters.items():
        found[name] = p.detach().clone()
        if name in optimizer.matrices:
            found[f"momentum.{name}"] = torch.zeros_like(p.detach())
        else:
            found |= {f"{key}.{name}": optimizer.state[p][key].clone() for key in MOMENTS}
    for slab, momentum in optimizer.momenta():
        pieces([found[f"momentum.{slab.name}"]], [slab.first], (slab.rows, slab.columns))[0].copy_(momentum)
    if run.world.size > 1:
        for name in optimizer.matrices:
            dist.all_reduce(found[f"momentum.{name}"])
    return found


def save(world: World, shards: str, folder: Path) -> dict[str, Any]:
    run = Run(world, shards, 1, None, *WORDS)
    losses = [run.step().loss, run.step().loss]
    documents = {"config.json": json.dumps(run.model.config.to_dict()), "tokenizer.json": "{}"}
    with Saver(folder / f"ranks{world.size}", run.engine, run.config.checkpoint, documents, print) as saver:
        saver.save({"step": 2})
        state = whole(run)
        saver.finish()
    if world.main:
        save_file(state, folder / f"whole{world.size}.safetensors")
    owned = world.gather([float(sum(m.numel() for _, m in run.engine.optimizer.momenta()))])
    result = {"losses": [*losses, run.step().loss, run.step().loss], "owned": [row[0] for row in owned], "stage": run.engine.stage}
    run.close()
    return result


def load(world: World, shards: str, folder: Path, sources: list[str]) -> dict[str, Any]:
    result = {}
    for source in sources:
        found = checkpoint.newest_together(folder / f"ranks{source}", world)
        assert found is not None
        run, exact = Run(world, shards, 1, found, *WORDS), load_file(folder / f"whole{source}.safetensors")
        state = whole(run)
        differ = [name for name in state.keys() | exact.keys() if not torch.equal(state[name], exact[name])]
        steps = run.engine.optimizer_steps()
        result[source] = {"losses": [run.step().loss, run.step().loss], "differ": differ, "steps": steps}
        run.close()
    return result


if __name__ == "__main__":
    world = start_distributed("cpu")
    shards, folder, what, *sources = sys.argv[1:]
    done = save(world, shards, Path(folder)) if what == "save" else load(world, shards, Path(folder), sources)
    if world.main:
        Path(folder, f"{what}{world.size}.json").write_text(json.dumps(done))
    world.barrier()
