"""The one trainer of the studies: a small model, AdamW, a learning rate for every step, and on a GPU the whole step as one CUDA graph.

    trainer = Trainer(model, device, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0)
    step = trainer.graph(lambda ids_BT, labels_BT: trainer.update(ids_BT, labels_BT)[:2])
    for number, (loss, gradient_norm) in trainer.run(step, range(1, 101), rate=lambda n: 1e-2 / n, inputs=lambda n: batches[n]):
        ...                                        # between two steps: log, save, look at the model, or let another trainer go on

`run` hands the device one step after the other and waits for none of them. Each trainer works on a stream of its own (`with trainer.here()`), so
that one process can keep several going. What a model reads, and what is written of it, is the business of the study: `cells.py` for the table of
tasks, `arms.py` for state collapse. Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from models.lm import LanguageModel, LMState
from scripts.studies.graphed import GraphedStep, Rate, Step
from training.optim import build_optimizer


class Trainer:
    """`model` on `device` with its optimizer. grad_clip: largest norm of the gradient; bf16: matrix products of a GPU run in bf16."""

    def __init__(
        self,
        model: LanguageModel,
        device: torch.device,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        grad_clip: float = 1.0,
        bf16: bool = False,
    ) -> None:
        self.device, self.grad_clip, self.bf16 = device, grad_clip, bf16 and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self.here():
            self.model = model.to(device).train()
            self.optimizer = build_optimizer(self.model, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)
            self.rate = Rate(self.optimizer, device)

    def here(self) -> contextlib.AbstractContextManager[object]:
        """The context in which work goes to this trainer's stream."""
        return torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()

    def update(
        self, ids_BT: Tensor, labels_BT: Tensor, state: LMState | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LMState | None]:
        """One optimizer step: (loss in nats per label, norm of the gradient before clipping, state after the last token), all on the device.

        Asks nothing of the device, so that it can be part of a graph. state: what the rows begin with; None: an empty one that is not returned.
        segment_ids: (B, T) the document of each token; None: one a row.
        """
        found = self.gradients(ids_BT, labels_BT, state, segment_ids)
        self.optimizer.step()
        return found

    def gradients(
        self, ids_BT: Tensor, labels_BT: Tensor, state: LMState | None = None, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor, LMState | None]:
        """`update` up to the clipped gradients, for an optimizer whose step cannot be part of a graph and is taken behind it."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(ids_BT, labels=labels_BT, segment_ids=segment_ids, state=state)
        loss = output.loss_sum / output.token_count
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        return loss.detach(), norm.detach(), output.state

    def graph(self, step: Step) -> GraphedStep:
        """`step`, which calls `update` on tensors of one shape, as a CUDA graph where there is a GPU."""
        return GraphedStep(step, self.device)

    def run(
        self,
        step: GraphedStep,
        numbers: Iterable[int],
        rate: Callable[[int], float],
        inputs: Callable[[int], tuple[Tensor, ...]] = lambda number: (),
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Takes the steps of these numbers, each at learning rate rate(number) on inputs(number); yields (number, outputs) after each.

        Outputs stay on the device, and the next step of a graph overwrites them: read or copy what you keep.
        """
        for number in numbers:
            with self.here():
                self.rate.set(rate(number))
                outputs = step(*inputs(number))
            yield number, outputs

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in the order of the optimizer's groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]
