"""Distillation: beside its next-token loss a model learns the distribution of a teacher, KL(teacher || student) of every labelled token.

The teacher lies on every rank, without gradients, and reads each micro-batch as the student does. The loss that a run reports stays the next-token
loss. Settings are the section `distill`: for `steps` of the run the loss is kl KL + next_token NLL, afterwards the next-token loss alone.
Legend: N labelled tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.checkpoint import load_model
from models.lm import LanguageModel
from models.prompt import prompt_of
from training.config.schema import Config
from training.errors import UserError
from training.world import World


def divergence(teacher_NV: Tensor, student_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of softmax(teacher / T) and softmax(student / T), times T squared, summed over N, in nats; in fp32 at least."""
    wide = torch.promote_types(student_NV.dtype, torch.float32)
    p, q = ((x.to(wide) / temperature).log_softmax(-1) for x in (teacher_NV, student_NV))
    return temperature**2 * (p.exp() * (p - q)).sum()


class Distillation:
    """What `LanguageModel.beside` is for a student: adds to its loss in training.

    until: gives the step from which the teacher is asked no more; where a run begins is known only when it does."""

    def __init__(
        self, teacher: LanguageModel, kl: float, next_token: float, until: Callable[[], int], temperature: float = 1.0, chunk: int = 2048
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.kl, self.next_token, self.until, self.temperature, self.chunk = kl, next_token, until, temperature, chunk
        self.now = True

    def begin_step(self, seed: int, step: int) -> None:
        self.now = step < self.until()

    def __call__(
        self, student: LanguageModel, h_BTD: Tensor, input_ids: Tensor, labels: Tensor, segment_ids: Tensor | None, nll: Tensor
    ) -> Tensor:
        """What is to be added to the summed next-token loss `nll` of the labelled tokens. h (B, T, D): what the student's head reads."""
        if not self.now:
            return nll * 0
        with torch.no_grad():
            taught_BTD = self.teacher.read(input_ids, segment_ids)
        places = (labels != -100).flatten().nonzero()[:, 0]
        taught_ND, h_ND = (h.flatten(0, 1)[places] for h in (taught_BTD, h_BTD))
        total = nll * (self.next_token - 1)
        for taught, own in zip(taught_ND.split(self.chunk), h_ND.split(self.chunk)):
            total = total + self.kl * checkpoint(self._of, student, taught, own, use_reentrant=False)
        return total

    def _of(self, student: LanguageModel, taught_ND: Tensor, h_ND: Tensor) -> Tensor:
        with torch.no_grad():
            wanted_NV = self.teacher.head(taught_ND)
        return divergence(wanted_NV, student.head(h_ND), self.temperature)


def begin(config: Config, student: LanguageModel, world: World, tokenizer: Any) -> None:
    """Gives `student` the teacher of distill.teacher, if there is one. Raises UserError for one that cannot teach it."""
    section = config.distill
    if section.teacher is None:
        return
    teacher, theirs, _ = load_model(section.teacher, world.device)
    if teacher.config.vocab_size != student.config.vocab_size or tokenizer is not None and theirs.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"The teacher {section.teacher} has other tokens than the student; prepare the data with tokenizer={section.teacher}."
        )
    if prompt_of(teacher) != prompt_of(student):  # what one says of the other's prompt is no prediction of the same token
        raise UserError(
            f"The teacher {section.teacher} reads prompts of {prompt_of(teacher)} tokens twice and the student of {prompt_of(student)}, so that they are "
            "asked for other tokens there; take prompts of one length."
        )
    student.beside = Distillation(
        teacher,
        section.kl,
        section.next_token,
        lambda: config.at.first_step + config.in_steps(section.steps),
        section.temperature,
        student.config.head_chunk,
    )
