"""The one contract of every sequence mixer: training, prefill, decoding and streaming are the same call.

What other parts of the project must know of a mixer (which tensors of its state are a memory, how the state decodes in a CUDA graph, whether
time can be cut over ranks) it declares here; the defaults suit a recurrence with a small state. Nothing is guessed from names, and
tests/models/test_contract.py holds every config to what is declared.

* Every mixer has `forward`, `init_state`, `init_weights` and `flops_per_token`.
* `state_roles`, if the state is more than recurrent tensors and bookkeeping. With a cache also `cached_tokens`, `state_bytes`, `fixed_state`,
  `open_state`, `random_state` and `in_segment`.
* Over ranks: forward asks `self.slice` (models/slices.py) where its state is None, and `why_not_split` returns ''. A longer exchange goes
  into a method `over_ranks`. Exported code is spared that method and all declarations (models/hub/flatten.py).
* The plan of memory is forward and its backward pass on tensors without storage, so neither may look at values there; attention goes through
  models/attend.py, and what a GPU would run otherwise asks `kernels.dispatch.planned()`.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from models.init import Module
from models.segments import document_starts, last_segment

if TYPE_CHECKING:
    from models.layers import RMSNorm
    from models.slices import Slice

__all__ = ["Role", "SequenceMixer", "document_starts", "last_segment", "state_tensors", "tensor_bytes", "with_tensors"]

# recurrent: a memory of all tokens so far, of fixed size. history: the last few inputs, as of a convolution. cache: grows with the tokens
# seen; in the fixed form a step writes only behind what was seen. bookkeeping: whole numbers; of shape (B,) the segment of the last token.
Role = Literal["recurrent", "history", "cache", "bookkeeping"]


class SequenceMixer(Module):
    """Mixes along time, causally. `state=None` trains on whole sequences and returns no state; with `init_state(...)` the same call
    prefills, decodes (T = 1) and streams: the result does not depend on how a sequence is cut into calls.

    slice: while time is cut over ranks, this rank's part of it, which forward asks for what lies before (models/slices.py).
    takes_documents: forward is also given documents=Documents(segment_ids), or None, in which layers share where documents lie.
    recurrence: the op that forward runs along time, by its name in the mixer's module, where evaluation may watch or replace it
    (evals/cures/hooks.py knows ssd, delta_rule and parallel_rnn); '' if it has none.
    whole_beyond: tokens beyond which it does depend on that, so that a longer sequence has to be one call; None: no such number.
    remakes_states: set in training where the backward pass is to make the recurrence's states again (models/remade.py); a Config that can says so in a
    property of this name.
    """

    slice: Slice | None = None
    takes_documents: ClassVar[bool] = False
    recurrence: str = ""
    whole_beyond: int | None = None
    remakes_states: bool = False

    def forward(self, x_BTD: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """y (B, T, D) and the new state (None if none was given). segment_ids (B, T) int: a token never sees another segment's."""
        raise NotImplementedError

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """The empty state: a dataclass of tensors."""
        raise NotImplementedError

    def init_weights(self, std: float, n_layers: int) -> None:
        """Draws all parameters from torch's global generator."""
        raise NotImplementedError

    def flops_per_token(self, T: int) -> int:
        """Forward FLOPs of one token (2 per multiply-add), averaged over a sequence of T; norms and activations are not counted."""
        raise NotImplementedError

    def state_flops_per_token(self) -> int:
        """FLOPs of one token of making states again, where `remakes_states` is set."""
        return 0

    # The state

    def state_roles(self) -> dict[str, Role]:
        """The role of each tensor of the state, of its open and of its fixed form. By default floating point tensors are recurrent."""
        empty = state_tensors(self.init_state(1, "meta"))
        return {name: "recurrent" if tensor.is_floating_point() else "bookkeeping" for name, tensor in empty.items()}

    def tensors_of(self, state: Any, *roles: Role) -> dict[str, Tensor]:
        """The tensors of `state` that have one of these roles, by name."""
        role_of = self.state_roles()
        return {name: tensor for name, tensor in state_tensors(state).items() if role_of[name] in roles}

    def grows(self) -> bool:
        """Whether the state holds a cache."""
        return "cache" in self.state_roles().values()

    def cached_tokens(self, state: Any) -> int:
        """Tokens in the caches of an open state; 0 where it has none."""
        if self.grows():
            raise NotImplementedError
        return 0

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the state after T tokens, bookkeeping left out."""
        if self.grows():
            raise NotImplementedError
        return tensor_bytes(self.init_state(batch, "meta", dtype))

    def named_memories(self, state: Any) -> dict[str, Tensor]:
        """The recurrent tensors of `state` under the names that reports show: (B, D), or (B, H, ...) of H heads."""
        return {name.split("_")[0]: tensor for name, tensor in self.tensors_of(state, "recurrent").items()}

    def in_segment(self, state: Any, segment_B: Tensor) -> Any:
        """The same memory as if its last token were of these segments, so that the next tokens of them go on with it."""
        rows = {n: t for n, t in self.tensors_of(state, "bookkeeping").items() if t.ndim == 1}
        return dataclasses.replace(state, **{name: segment_B.to(tensor.dtype) for name, tensor in rows.items()})

    def at_position(self, state: Any, position: int) -> Any:
        """The same memory as if the next token were at this position; a recurrence has no positions."""
        return state

    def random_state(self, batch: int, T: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """A state as after T tokens, but drawn at random: a step takes as long from it, and nobody has to read the tokens."""
        if self.grows():
            raise NotImplementedError
        state = self.init_state(batch, device, dtype)
        return self.in_segment(
            dataclasses.replace(state, **{n: torch.randn_like(t) for n, t in self.tensors_of(state, "recurrent", "history").items()}),
            torch.zeros(batch, device=device, dtype=torch.int32),
        )

    # Decoding in a CUDA graph

    def fixed_state(self, state: Any, capacity: int) -> Any:
        """A copy of `state` whose tensors stay where they are: forward of one token writes into them or returns tensors to copy into them.
        Caches hold at most `capacity` tokens, those of `state` included."""
        if self.grows():
            raise NotImplementedError
        tensors = state_tensors(state)
        return dataclasses.replace(state, **{n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()})

    def open_state(self, state: Any) -> Any:
        """The ordinary state of a fixed one, whose tensors it may share."""
        return state

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: Any) -> Callable[[], None] | None:
        """What takes x <- keep x + mixer(norm(x)) over one token in a few kernels, writing over x (fp32) and the fixed state (of
        models/decode.py); None: there is no such form, and forward is called."""
        return None

    # Time over ranks

    def why_not_split(self, T: int = 1 << 62) -> str:
        """Why this mixer cannot run on slices of T tokens, one a rank, or ''. A mixer whose forward asks `self.slice` overrides it."""
        return f"{type(self).__module__} has no form for it"


def state_tensors(state: Any) -> dict[str, Tensor]:
    """The tensors in the fields of a mixer's state, by name, in order."""
    tensors = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
    return tensors


def with_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`state` with change(tensor) in place of every tensor."""
    return dataclasses.replace(state, **{name: change(tensor) for name, tensor in state_tensors(state).items()})


def tensor_bytes(state: Any) -> int:
    """Bytes of all floating point tensors in a (nested) dataclass, list or tensor; bookkeeping is whole numbers and left out."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size() if state.is_floating_point() else 0
    if isinstance(state, (list, tuple)):
        return sum(tensor_bytes(item) for item in state)
    if dataclasses.is_dataclass(state):
        return sum(tensor_bytes(getattr(state, f.name)) for f in dataclasses.fields(state))
    return 0
