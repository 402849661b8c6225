"""train.py with passes that run outside of DeepSpeed, as a CUDA graph's do, on CPU ranks: `python -m tests.training.graph_ranks` and its words."""

from __future__ import annotations

import runpy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.loader import Batch
from training import engine


class Outside:
    """Stands for training.graph.GraphedPass."""

    why_not = ""

    def __init__(self, module: nn.Module, device: torch.device, autocast: bool) -> None:
        self.module, self.autocast, self.runs = module, autocast, 0

    def run(self, batch: Batch, scale: float) -> Tensor | None:
        self.runs += 1
        if self.runs == 7 and dist.get_rank():  # here, and on no other rank, no pass fits a graph any more
            self.why_not = "tried"
        if self.runs == 2 or self.why_not:
            return None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = self.module(batch.input_ids, labels=batch.labels, segment_ids=batch.segment_ids)
        ((output.loss_sum + output.z_loss_sum) * scale).backward()
        return output.loss_sum.detach().double()

    def news(self) -> list[str]:
        return ["Passes ran outside."]


if __name__ == "__main__":
    engine.GraphedPass = Outside  # type: ignore[assignment,misc]
    engine.may_replay = lambda config, world: True
    runpy.run_path("train.py", run_name="__main__")
