"""Exports small models and compares their code with the checkpoint where the recurrences run in kernels, and gradients where they do not:
`TRITON_INTERPRET=1 python tests/hub/exported_kernels.py SCRATCH`, or on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from models.checkpoint import load_model
from models.config import ModelConfig
from models.hub.export import write_folder
from models.lm import LanguageModel
from tests.hub.folders import checkpoint

MIXERS: dict[str, dict[str, Any]] = {
    **{cell: {"type": "rnn", "cell": cell, "n_heads": 2, "expand": 1.5} for cell in ("paragru", "paralstm", "mingru")},
    "mamba2": {"type": "mamba2", "d_state": 6, "head_dim": 12, "n_groups": 2, "chunk": 5},
    "delta": {"type": "delta", "n_heads": 2, "n_k_heads": 1, "head_dim": 12, "updates": 2, "negative": True},
    "m2rnn": {"type": "m2rnn", "n_heads": 2, "n_k_heads": 1, "head_dim": 12},
}


def check(folder: Path, name: str, device: str) -> None:
    settings = ModelConfig(vocab_size=67, d_model=48, n_layers=1, d_ff=24, pattern=["a"], mixers={"a": MIXERS[name]})
    source, out = checkpoint(folder / "c", settings), folder / "hf"
    out.mkdir()
    write_folder(source, out, "fp32", 10**9, "apache-2.0")
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).to(device).eval()
    ours: LanguageModel = load_model(source)[0]
    table = {"mamba2": "SCAN", "delta": "RULE", "m2rnn": "MATRIX"}.get(name)  # of these the prompt, of the others every token
    T = 300 if device == "cuda" else {"mamba2": 19, "delta": 35}.get(name, 9)  # two chunks in the interpreter
    ids, mask = torch.randint(1, 67, (2, T)), torch.ones(2, T, dtype=torch.long)
    mask[0, :3] = 0  # padding starts a text anew
    code = sys.modules[type(theirs).__module__]
    walked = []
    plain = getattr(code, table)[0] if table else code.walk_on_gpu

    def watched(*arguments: Any) -> Any:
        walked.append(1)
        return plain(*arguments)

    if table:
        getattr(code, table)[0] = watched
    else:
        code.walk_on_gpu = watched  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = torch.stack([ours(row[keep.bool()][None]).logits[0, -1] for row, keep in zip(ids, mask)])
        given = theirs(ids.to(device), attention_mask=mask.to(device)).logits[:, -1].cpu()
        new = [
            theirs.generate(ids[1:].to(device), max_new_tokens=5, do_sample=False, use_cache=c, eos_token_id=None) for c in (True, False)
        ]
    gap = float((given - expected).abs().max())
    assert gap < 1e-4 and torch.equal(*new) and len(walked) > 5, (name, gap, len(walked))
    if table:  # a GPU with less shared memory
        getattr(code, table)[0] = out_of_resources
        with torch.no_grad():
            again = theirs(ids.to(device), attention_mask=mask.to(device)).logits[:, -1].cpu()
        assert (again - expected).abs().max() < 1e-4 and not getattr(code, table)
    theirs.train()
    theirs(ids.to(device), labels=ids.to(device)).loss.backward()
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    output = ours(ids, labels)
    (output.loss_sum / output.token_count).backward()
    pairs = [(theirs.model.embed_tokens.weight, ours.embedding.weight)]
    if table:
        pairs.append((theirs.model.layers[0].mixer.A_log, ours.blocks[0].mixer.A_log))
    elif ours.blocks[0].mixer.recurrent is not None:
        pairs.append((theirs.model.layers[0].mixer.recurrent, ours.blocks[0].mixer.recurrent))
    for one, two in pairs:
        torch.testing.assert_close(one.grad.cpu(), two.grad, atol=1e-5, rtol=1e-3)
    print(name, f"{gap:.1e}", flush=True)


def out_of_resources(*arguments: Any) -> Any:
    import triton

    raise triton.OutOfResources(200_000, 100_000, "shared memory")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        from tests.kernels.interpreter import patch_once

        patch_once()
    for number, name in enumerate(MIXERS):
        check(Path(sys.argv[1], str(number)), name, "cuda" if torch.cuda.is_available() else "cpu")
    print("ok")
