r"""Text from a checkpoint: the prompt is read in chunks in parallel, then one token at a time with the carried state.

    python -m models.generate checkpoint=runs/quickstart prompt="It is a truth" \
        [max_new_tokens=100] [temperature=0.8] [top_k=50] [top_p=1.0] [seed=0] [device=auto]

temperature=0 is greedy. A recurrent model's state does not grow; attention layers keep their cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.lm import LanguageModel

PREFILL_CHUNK = 2048


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """One token id per row (B,). top_k keeps the k likeliest, top_p the smallest set that holds that much probability."""
    logits_BV = logits_BV.float()
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if top_k:
        kth = logits_BV.topk(min(top_k, logits_BV.shape[-1]), -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits_BV.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        before[:, 0] = -1.0  # the likeliest token always stays
        logits_BV = ordered.masked_fill(before >= top_p, float("-inf")).gather(-1, order.argsort(-1))
    return torch.multinomial(logits_BV.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits_BV.device)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues prompt_ids (B, T) int64 by up to max_new_tokens; returns prompt and continuation (B, T + n).

    A row that has produced eos_id goes on with eos_id; generation ends when all have. Raises ValueError for an empty prompt.
    """
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] == 0:
        raise ValueError("The prompt must hold at least one token.")
    generator = torch.Generator().manual_seed(seed)
    state = model.init_state(prompt_ids.shape[0])
    output: Any = None
    for piece in prompt_ids.split(PREFILL_CHUNK, 1):
        output = model(piece, state=state, last_only=True)
        state = output.state
    ids, done = [prompt_ids], torch.zeros(prompt_ids.shape[0], dtype=torch.bool, device=prompt_ids.device)
    for _ in range(max_new_tokens):
        token_B = sample(output.logits[:, -1], temperature, top_k, top_p, generator)
        if eos_id is not None:
            token_B = torch.where(done, torch.full_like(token_B, eos_id), token_B)
            done = done | (token_B == eos_id)
        ids.append(token_B[:, None])
        if on_token is not None:
            on_token(token_B)
        if eos_id is not None and bool(done.all()):
            break
        output = model(token_B[:, None], state=state, last_only=True)
        state = output.state
    return torch.cat(ids, 1)


DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "prompt": "The ",
    "max_new_tokens": 100,
    "temperature": "0.8",
    "top_k": 50,
    "top_p": "1.0",
    "seed": "0",
    "device": "auto",
}


def _number(values: dict[str, Any], key: str, low: float) -> float:
    from training.errors import UserError

    try:
        number = float(values[key])
    except ValueError:
        number = low - 1
    if number < low:
        raise UserError(f"{key} must be a number of at least {low:g}, not {values[key]!r}.")
    return number


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    from training.arguments import parse_arguments
    from training.checkpoint import load_model
    from training.engine import pick_device
    from training.errors import UserError

    arguments = sys.argv[1:] if arguments is None else arguments
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(__doc__)
        return 0
    try:
        values = parse_arguments(arguments, DEFAULTS)
        if not values["checkpoint"]:
            raise UserError("Say what to generate from: checkpoint=DIR.")
        temperature, top_p, seed = _number(values, "temperature", 0), _number(values, "top_p", 0), int(_number(values, "seed", 0))
        model, tokenizer, _ = load_model(values["checkpoint"], pick_device(values["device"]))
    except UserError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        return 2
    from data.tokenizer import eot_id

    eot, shown, ids = eot_id(tokenizer), values["prompt"], tokenizer.encode(values["prompt"]).ids
    print(shown, end="", flush=True)

    def show(token_B: Tensor) -> None:
        nonlocal shown
        ids.append(int(token_B[0]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    prompt = torch.tensor([[eot, *ids]], device=model.embedding.weight.device)
    generate(
        model,
        prompt,
        values["max_new_tokens"],
        temperature=temperature,
        top_k=values["top_k"],
        top_p=top_p,
        seed=seed,
        eos_id=eot,
        on_token=show,
    )
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
