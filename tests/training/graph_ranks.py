"""train.py with passes that run outside of DeepSpeed, as a CUDA graph's do, on CPU ranks: `python -m tests.training.graph_ranks` and its words."""

from __future__ import annotations

import runpy

import torch.distributed as dist
from torch import Tensor

from data.loader import Batch
from training import passes
from training.graph import GraphedPass


class Outside(GraphedPass):
    """Stands for GraphedPass on a CPU, where nothing is recorded."""

    runs = 0

    def run(self, batch: Batch, scale: float) -> Tensor | None:
        self.runs += 1
        if self.runs == 7 and dist.get_rank():  # here, and on no other rank, no pass fits a graph any more
            self.why_not = "tried"
        if self.runs == 2 or self.why_not:
            return None
        return self.as_written(batch, scale)

    def news(self) -> list[str]:
        return ["Passes ran outside."]


if __name__ == "__main__":
    passes.GraphedPass = Outside  # type: ignore[assignment,misc]
    passes.may_replay = lambda config, world, model: True
    runpy.run_path("train.py", run_name="__main__")
