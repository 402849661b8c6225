"""The language model: embedding, blocks, norm, head, and a loss that never holds the logits of a whole sequence.

Legend: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError
from models import depth, param
from models.block import Block
from models.config import ModelConfig
from models.contract import tensor_bytes
from models.head import Head
from models.init import Module, Unset, normal_, tag
from models.layers import Embedding, RMSNorm
from models.remade import parts_by_layer
from models.segments import Documents
from models.walk import Walk


@dataclass
class LMState:
    """The states of all layers, in order; of blocks that are visited several times, one for each visit."""

    layers: list[Any]

    def bytes(self) -> int:
        return tensor_bytes(self.layers)


@dataclass
class LMOutput:
    """loss_sum: nats summed over labelled tokens; z_loss_sum: already weighted, with what a way through the depth
    and a teacher add. Without labels only logits (and state) are filled."""

    loss_sum: Tensor | None = None
    z_loss_sum: Tensor | None = None
    token_count: Tensor | None = None
    token_nll: Tensor | None = None
    logits: Tensor | None = None
    state: LMState | None = None


def check_ids(ids: Tensor, vocab_size: int, whose: str = "the text") -> None:
    """Raises UserError where a token id is beyond the vocabulary, as of a tokenizer that is another model's: the embedding would be read past its
    end, on a GPU without a word. Waits for ids on a GPU."""
    if ids.numel() and (largest := int(ids.max())) >= vocab_size:
        raise UserError(
            f"The token id {largest} of {whose} is beyond the {vocab_size:,} tokens of the model: its tokenizer.json is another model's, or has had "
            "tokens added; put the model's own beside the weights."
        )


class LanguageModel(Module):
    """Built from a ModelConfig; `init_weights(seed)` draws the parameters (construction leaves them unset, so meta devices work)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        problems = config.problems()
        if problems:
            raise UserError(problems)
        self.config = config
        with Unset():
            self.embedding = Embedding(config.vocab_size, config.d_model)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
            self.depth = depth.build(config.depth, config.d_model, config.n_layers)
            self.norm = RMSNorm(config.d_model, config.norm_eps, centred=config.centred_norms)
            self.head = Head(config.d_model, config.vocab_size)
        self.beside: Any = None  # what adds to the loss in training, as training/distill.py
        self.residual_dtype: torch.dtype | None = None  # of the residual stream in training (train.residual); None: the embedding's
        tag(self.embedding.weight, "no_decay", "vocabulary")
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        param.prepare(self, drawn=False)

    def init_weights(self, seed: int) -> None:
        """Draws every parameter from `seed`, the same on every device and rank; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            n_layers = len(self.visits()) if self.config.residual_init == "depth" else 0
            normal_(self.embedding.weight, self.config.init_std)
            if not self.config.tie_embeddings:
                normal_(self.head.weight, self.config.init_std)
            self.norm.init_weights()
            for block in self.blocks:
                block.init_weights(param.hidden_std(self.config), n_layers)
            if self.depth is not None:
                self.depth.init_weights(self.config.init_std, n_layers)
            param.prepare(self, drawn=True)

    def visits(self) -> list[Block]:
        """The blocks in the order in which tokens go through them, where nothing is trained: one for each state of `init_state`."""
        return self._blocks(range(len(self.blocks)) if self.depth is None else self.depth.visits())

    @property
    def whole_beyond(self) -> int | None:
        """Tokens beyond which a sequence has to be one call, as what it gives depends on how it is cut; None: however long it is."""
        return min((n for block in self._blocks(range(len(self.blocks))) if (n := block.mixer.whole_beyond) is not None), default=None)

    def _blocks(self, layers: Iterable[int]) -> list[Block]:
        return [self.blocks[i] for i in layers]  # type: ignore[misc]

    @property
    def varies(self) -> bool:
        """Whether the work of a training step is drawn anew in each (`begin_step`)."""
        return self.depth is not None and bool(self.depth.config.varies) or self.beside is not None

    def begin_step(self, seed: int, step: int) -> None:
        """To be called before the training step that follows `step` steps: what it draws depends on nothing else."""
        if self.depth is not None:
            self.depth.begin_step(seed, step)
        if self.beside is not None:
            self.beside.begin_step(seed, step)

    def set_activation_checkpointing(self, choice: Any) -> None:
        """Which activations training computes again in the backward pass instead of keeping them: a setting of models/recompute.py, as 'none',
        'full' or {'mlp': 2}, or its parts by layer. Raises UserError for another one."""
        for block, parts in zip(self.blocks, parts_by_layer(choice, self.config)):
            block.remade = parts

    def follow(self, share: float) -> bool:
        """To be called before each training step with the share of the run that is behind it. True: from now on passes are made of other operations
        than before, so that a graph of them is out of date."""
        return any([block.mlp.follow(share) for block in self.blocks if block.mlp is not None])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        state: LMState | None = None,
        *,
        reduction: str = "sum",
        last_only: bool = False,
    ) -> LMOutput:
        """With labels (B, T; -100 ignored): summed losses, with reduction='none' also each token's. Without: logits (B, T or 1, V).

        state: from `init_state` or an earlier call; the output then carries the next one.
        """
        walk = self._walk(input_ids, segment_ids, state)
        output = LMOutput(state=None if state is None else LMState(walk.after))
        if labels is None:
            read = slice(-1, None) if last_only else slice(None)
            output.logits = self.head(self._final(walk, read))
            return output
        h_BTD = self._final(walk)
        output = self._loss(h_BTD, labels, reduction, output, walk.token_loss_BT)
        if self.beside is not None and self.training:
            output.z_loss_sum = output.z_loss_sum + self.beside(self, h_BTD, input_ids, labels, segment_ids, output.loss_sum)
        return output

    def hidden(self, input_ids: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """What the head reads (B, T, D) of tokens that follow `state`, and the state behind them."""
        walk = self._walk(input_ids, None, state)
        return self._final(walk), LMState(walk.after)

    def read(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """What the head reads (B, T, D) of whole sequences."""
        return self._final(self._walk(input_ids, segment_ids, None))

    def _walk(self, input_ids: Tensor, segment_ids: Tensor | None, state: LMState | None) -> Walk:
        """Tokens that have gone through all blocks."""
        documents = None if segment_ids is None or state is not None else Documents(segment_ids)
        x_BTD = self.embedding(input_ids)
        if self.training and self.residual_dtype is not None:
            x_BTD = x_BTD.to(self.residual_dtype)
        walk = Walk(x_BTD, None if state is None else state.layers, segment_ids, documents)
        # no tokens change nothing; in training they go through all blocks, so that every weight has its gradient, of zeros
        if not input_ids.shape[1] and not torch.is_grad_enabled():
            walk.after = [] if state is None else list(state.layers)
            return walk
        if self.depth is not None:
            self.depth(self.blocks, walk)
        else:
            for block in self.blocks:
                walk.through(block)
        return walk

    def _final(self, walk: Walk, read: slice = slice(None)) -> Tensor:
        x_BTD, owed = walk.stream[:, read], walk.owed
        return self.norm(x_BTD) if owed is None else self.norm(x_BTD, owed=(owed[0][:, read], owed[1]))[1]

    def _loss(self, x_BTD: Tensor, labels: Tensor, reduction: str, output: LMOutput, more_BT: Tensor | None = None) -> LMOutput:
        chunk, recompute = self.config.head_chunk, self.config.recompute_head
        summed = reduction == "sum" and not self.config.z_loss
        nll_N, log_z_N = self.head(x_BTD.flatten(0, 1), labels.flatten(), chunk=chunk, recompute=recompute, summed=summed)
        output.loss_sum = nll_N.sum()
        output.z_loss_sum = self.config.z_loss * log_z_N.square().sum() if self.config.z_loss else torch.zeros_like(output.loss_sum)
        if more_BT is not None:
            output.z_loss_sum = output.z_loss_sum + more_BT.masked_fill(labels == -100, 0.0).sum()
        output.token_count = (labels != -100).sum()
        output.token_nll = nll_N.view_as(labels) if reduction == "none" else None
        return output

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LMState:
        """The empty state for `batch` sequences, on the model's device unless told otherwise."""
        device = device or self.embedding.weight.device
        return LMState([block.mixer.init_state(batch, device, dtype) for block in self.visits()])

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; a tied head counts as none. The values add up to all parameters."""
        counts = {"embedding": self.embedding.weight.numel(), "head": 0 if self.config.tie_embeddings else self.head.weight.numel()}
        for layer, block in enumerate(self.blocks):
            name = f"mixer {self.config.mixer_name(layer)}"
            counts[name] = counts.get(name, 0) + sum(p.numel() for p in block.mixer.parameters())
            if block.mlp is not None:
                counts["mlp"] = counts.get("mlp", 0) + sum(p.numel() for p in block.mlp.parameters())
        if self.depth is not None:
            counts["depth"] = sum(p.numel() for p in self.depth.parameters())
        counts["norms and scales"] = sum(p.numel() for p in self.parameters()) - sum(counts.values())
        return counts

    def flops_per_token(self, T: int) -> int:
        """Forward FLOPs of one token in a sequence of T, head included, embedding look-up not."""
        more = 0 if self.depth is None else self.depth.flops_per_token()
        return sum(block.flops_per_token(T) for block in self.visits()) + more + 2 * self.config.d_model * self.config.vocab_size

    def training_flops_per_token(self, T: int) -> int:
        """FLOPs of one token of a training step: three times those forward, once of visits that have no gradient."""
        whole = sum(block.flops_per_token(T) for block in self.visits())
        learnt = sum(block.flops_per_token(T) for block in self._blocks(self.config.learnt_visits()))
        return 3 * self.flops_per_token(T) - 2 * (whole - learnt)

    def recomputed_flops_per_token(self, T: int, compiled: bool = False) -> int:
        """Forward FLOPs of one token that a training step computes twice: of what the blocks compute again, and of the logits with a z-loss, or where
        torch.compile traces the head (models/head.py: gradients are made with the losses where ops run as they are called)."""
        again = self.config.recompute_head and (self.config.z_loss or compiled)
        twice = 2 * self.config.d_model * self.config.vocab_size if again else 0
        return twice + sum(block.recomputed_flops_per_token(T, block.remade) for block in self._blocks(self.config.learnt_visits()))

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        return sum(block.mixer.state_bytes(T, batch, dtype) for block in self.visits())
