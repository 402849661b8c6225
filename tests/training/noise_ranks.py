"""Work of several ranks for test_grad_noise.py: python -m tests.training.noise_ranks SHARDS FOLDER. At every ZeRO stage (on one rank at 0 alone) two
steps with gradient noise, and the weights after them into FOLDER/weights-RANKS-STAGE.safetensors; on one rank also without, into quiet.safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.training.reshape import Run
from training.world import start_distributed


def main(shards: str, folder: Path) -> None:
    world = start_distributed("cpu")
    arms = [(f"weights-{world.size}-{stage}", stage, 1.0) for stage in (range(4) if world.size > 1 else [0])]
    for name, stage, eta in [*arms, *([("quiet", 0, 0.0)] if world.size == 1 else [])]:
        run = Run(world, shards, stage, None, "wrapper=grad_noise", f"optim.wrapper.eta={eta}", "optim.eps=1e-3")
        for steps in (5, 6):
            run.engine.follow(steps)
            run.step()
        weights = {key: tensor for key, tensor in run.whole().items() if key in run.engine.parameters}
        if world.main:
            save_file(weights, folder / f"{name}.safetensors")
        run.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
