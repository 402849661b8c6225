"""What transformers asks of a model class (docs/hub.md lists it), of exported folders with code of their own beside a stock Llama."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig
from models.hub.export import write_folder
from tests.hub.folders import checkpoint
from tests.mixers import mixer_configs

GRU: dict[str, Any] = {"type": "rnn", "n_heads": 4}
MAMBA: dict[str, Any] = {"type": "mamba2", "d_state": 5, "head_dim": 8, "n_groups": 2, "chunk": 5}
ATTENTION: dict[str, Any] = {"type": "attention", "n_heads": 4, "n_kv_heads": 2}


def small(pattern: list[str], mixers: dict[str, Any], **values: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 269, "d_model": 32, "n_layers": 3, "d_ff": 48, "pattern": pattern, "mixers": mixers, **values})


KINDS = {
    "llama": small(["a"], {"a": ATTENTION}, tie_embeddings=True),
    "paragru": small(["g"], {"g": GRU}, learnable_residual=True, tie_embeddings=True),
    "hybrid": small(
        ["m", "w", "s"],
        {"m": MAMBA, "w": {**ATTENTION, "window": 5, "qkv_bias": True}, "s": {**ATTENTION, "rope_fraction": 0.5, "qk_norm": True}},
    ),
}


def forget_code() -> None:
    """Drops the modules that transformers has made of folders' code: their package lies where the first of them was put."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The exported folders by name."""
    import transformers.dynamic_module_utils as modules

    root = tmp_path_factory.mktemp("duties")
    forget_code()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "HF_MODULES_CACHE", str(root / "modules"))
        patch.syspath_prepend(str(root / "modules"))
        found = {}
        for name, settings in KINDS.items():
            source, found[name] = checkpoint(root / "c" / name, settings), root / name
            found[name].mkdir()
            write_folder(source, found[name], None, 10**9, "mit")
        yield found
    forget_code()


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(name: str, folders: dict[str, Path]) -> Any:
    return load(folders[name]).eval()


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(1, 269, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_outputs_as_dicts_tuples_and_hidden_states(model: Any) -> None:
    ids = ids_of(2, 9)
    whole = model(ids, labels=ids, output_hidden_states=True)
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(whole.hidden_states[0], model.get_input_embeddings()(ids))
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits)
    assert torch.equal(model.model(ids, output_hidden_states=True).hidden_states[1], whole.hidden_states[1])
    assert model(ids).hidden_states is None
    parts = model(ids, labels=ids, return_dict=False, use_cache=False)
    assert isinstance(parts, tuple) and len(parts) == 2 and torch.equal(parts[0], whole.loss) and torch.equal(parts[1], whole.logits)
    assert isinstance(model.model(ids, return_dict=False), tuple)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 269)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole.logits)
    for given in ({}, {"input_ids": ids, "inputs_embeds": whole.hidden_states[0]}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**given)


@torch.no_grad()
def test_the_loss_counts_what_it_is_told(model: Any) -> None:
    ids, labels = ids_of(2, 9), ids_of(2, 9)
    labels[:, :4] = -100
    sums = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(ids, labels=labels).loss, sums / 10)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=40).loss, sums / 40)
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss, sums / 40)
    torch.testing.assert_close(
        model(ids, labels=labels, shift_labels=labels).loss, F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    )


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mode", ["eval", "train", "cacheless"])
def test_padding_on_either_side_changes_nothing(model: Any, side: str, mode: str) -> None:
    alone, pads = ids_of(1, 11), {"left": (4, 0), "right": (0, 4), "both": (1, 3)}[side]
    ids = torch.cat([F.pad(alone, pads), ids_of(1, 15)])
    mask = torch.cat([F.pad(torch.ones_like(alone), pads), torch.ones(1, 15, dtype=torch.long)])
    model.train(mode == "train")
    with torch.no_grad():
        options = {"use_cache": False} if mode == "cacheless" else {}
        found = model(ids, attention_mask=mask, output_hidden_states=True, **options)
        want = [model(row, output_hidden_states=True, **options) for row in (alone, ids[1:])]
        for row, wanted in enumerate(want):
            text = mask[row].bool()
            torch.testing.assert_close(found.logits[row, text], wanted.logits[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.hidden_states[1][row, text], wanted.hidden_states[1][0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_text_goes_on_after_padding_and_from_a_cache(model: Any, name: str) -> None:
    from transformers import DynamicCache

    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    alone = ids_of(1, 7)
    wanted = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
    for pads in ((3, 0), (0, 3)) if name != "llama" else ((3, 0),):  # a Llama warns of padding on the right, and goes on from the padding
        ids = torch.cat([F.pad(alone, pads), ids_of(1, 10)])
        mask = torch.cat([F.pad(torch.ones_like(alone), pads), torch.ones(1, 10, dtype=torch.long)])
        for cached in (True, False):
            assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=cached, **options)[0, 10:], wanted[0, 7:])
    out = model.generate(
        alone, attention_mask=torch.ones_like(alone), return_dict_in_generate=True, output_scores=True, output_hidden_states=True, **options
    )
    assert torch.equal(out.sequences, wanted) and len(out.scores) == 6 and len(out.hidden_states) == 6
    cache = model(alone, use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    longer = wanted[:, :-1]
    second = model(longer[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(second, model(longer).logits[:, 7:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(longer[:, 7:], past_key_values=kept).logits, second)
    torch.manual_seed(0)
    many = model.generate(
        alone, attention_mask=torch.ones_like(alone), do_sample=True, num_return_sequences=3, max_new_tokens=4, pad_token_id=0
    )
    assert many.shape[0] == 3
    if name != "llama":
        with pytest.raises(ValueError, match="The cache of this model"):
            model(alone, past_key_values=DynamicCache())
        with pytest.raises(ValueError, match="no padding after text"):
            model(ids_of(1, 3), past_key_values=cache, attention_mask=F.pad(torch.ones(1, 12), (0, 3)))
        with pytest.raises(ValueError, match="attention_mask must have a row"):
            model(alone, attention_mask=torch.ones(1, 1, 7, 7))


@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt(model: Any) -> None:
    """As with prefill_chunk_size: rows that are padding for a whole piece begin in a later one."""
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    alone = ids_of(1, 5)
    ids = torch.cat([F.pad(alone, (7, 0)), ids_of(1, 12)])
    mask = torch.cat([F.pad(torch.ones_like(alone), (7, 0)), torch.ones(1, 12, dtype=torch.long)])
    cut = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
    cut = model(ids[:, 4:7], attention_mask=mask[:, :7], past_key_values=cut).past_key_values
    found = model(ids[:, 7:], attention_mask=mask, past_key_values=cut).logits
    torch.testing.assert_close(found[0], model(alone).logits[0], atol=1e-4, rtol=1e-4)
    whole = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **options), whole)


@torch.no_grad()
def test_no_tokens_change_nothing(model: Any, name: str) -> None:
    if name == "llama":
        pytest.skip("a stock Llama cannot")
    ids, none = ids_of(2, 9), ids_of(2, 0)
    found = model(none, attention_mask=none, output_hidden_states=True)
    assert found.logits.shape == (2, 0, 269) and [h.shape for h in found.hidden_states] == [(2, 0, 32)] * 4
    assert model(none, use_cache=False).logits.shape == (2, 0, 269)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    assert model(none, attention_mask=torch.ones(2, 4), past_key_values=cache).logits.shape == (2, 0, 269)
    torch.testing.assert_close(model(ids[:, 4:], past_key_values=cache).logits, model(ids).logits[:, 4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_texts_do_not_see_each_other(model: Any) -> None:
    one, two = ids_of(1, 6), ids_of(1, 9)
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    found = model(torch.cat([one, two], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat([model(one).logits, model(two).logits], 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_are_computed_again_with_the_same_gradients(model: Any, reentrant: bool) -> None:
    ids, calls = ids_of(2, 8), []
    model.train()
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    model.enable_input_require_grads()
    layer = model.model.layers[1]
    next(iter(layer.children())).register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids, use_cache=True).loss.backward()
    assert len(calls) == 2
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


class Adapted(torch.nn.Module):
    """What adapters such as LoRA put in the place of a layer: its weight is still to be seen, and what they learn acts in the call alone."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(base.weight.numel())
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.down = torch.nn.Parameter(torch.randn(2, base.in_features, generator=generator) / base.in_features**0.5)
        self.up = torch.nn.Parameter(0.3 * torch.randn(base.out_features, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def test_what_takes_a_layers_place_acts_and_learns(model: Any) -> None:
    merged, ids = copy.deepcopy(model), ids_of(2, 9)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Adapted(model.get_submodule(name)))
        new = model.get_submodule(name)
        with torch.no_grad():
            merged.get_submodule(name).weight += new.up @ new.down
    found, wanted = model(ids, use_cache=True), merged(ids, use_cache=True)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    step = [m(ids[:, :1], past_key_values=out.past_key_values).logits for m, out in ((model, found), (merged, wanted))]
    torch.testing.assert_close(*step, atol=1e-4, rtol=1e-4)
    model(ids, labels=ids).loss.backward()
    for name in names:
        assert float(model.get_submodule(name).up.grad.abs().max()) > 0, name


@torch.no_grad()
def test_weights_may_be_elsewhere_until_a_layer_is_called(tmp_path: Path, folders: dict[str, Path]) -> None:
    """As accelerate leaves them on the host or the disk where a GPU is too small for all."""
    accelerate = pytest.importorskip("accelerate")
    mixers = {str(mapping["type"]): mapping for mapping in mixer_configs().values()}
    source, folder = checkpoint(tmp_path / "c", small(list(mixers), mixers, n_layers=len(mixers))), tmp_path / "every"
    folder.mkdir()
    write_folder(source, folder, None, 10**9, "mit")
    here = load(folder).eval()
    away = accelerate.cpu_offload(copy.deepcopy(here), execution_device=torch.device("cpu"))
    ids, caches = ids_of(2, 8), [None, None]
    for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        found = [m(piece, past_key_values=cache, use_cache=True) for m, cache in zip((away, here), caches)]
        caches = [out.past_key_values for out in found]
        torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_copies_and_pickles(model: Any) -> None:
    ids = ids_of(1, 6)
    wanted = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, wanted)


@torch.no_grad()
def test_saved_and_loaded_again(model: Any, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ids, own = ids_of(1, 8), name != "llama"
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert (tmp_path / "a" / "modeling_everywhen.py").exists() == own
    assert torch.equal(load(tmp_path / "a").eval()(ids).logits, wanted)
    low = load(folders[name], dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    assert low(ids).logits.dtype == torch.bfloat16
    exact = [n for n, p in low.named_parameters() if p.dtype == torch.float32]
    assert bool(exact) == own and all(n.rsplit(".", 1)[-1] in ("recurrent", "A_log", "D", "dt_bias") for n in exact)
    low.save_pretrained(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b", dtype="auto").eval()(ids).logits, low(ids).logits)
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"
    model.resize_token_embeddings(300)
    assert model(ids).logits.shape[-1] == 300 and model.config.vocab_size == 300
    torch.testing.assert_close(model(ids).logits[..., :269], wanted)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == KINDS[name].tie_embeddings
    model.save_pretrained(tmp_path / "c")
    assert load(tmp_path / "c")(ids).logits.shape[-1] == 300
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_a_new_model_of_the_config_is_drawn_as_in_pretraining(model: Any, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    new = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    for n, p in new.named_parameters():
        assert bool(p.isfinite().all()) and float(p.abs().max()) < 20, n
        if n.endswith(("embed_tokens.weight", "q_proj.weight", "in_proj.weight", "mlp.up.weight")):
            assert 0.015 < float(p.std()) < 0.025, (n, float(p.std()))
        if n.endswith("norm.weight"):
            assert bool((p == 1).all()), n
    if name == "llama":
        return
    down = new.get_parameter("model.layers.1.mlp.down.weight")
    assert 0.006 < float(down.std()) < 0.01  # 0.02 / sqrt(2 * 3)
    if name == "paragru":
        assert (
            1 < float(new.get_parameter("model.layers.0.mixer.cell_bias").std())
            and float(new.get_parameter("model.layers.0.residual_scale").std()) == 0
        )
    source = tmp_path / "partly"
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    gone = next(n for n in tensors if n.endswith(("recurrent", "A_log")))
    save_file({n: t for n, t in tensors.items() if n != gone}, source / "model.safetensors", metadata={"format": "pt"})
    found = load(source).state_dict()
    assert bool(found[gone].isfinite().all()) and all(torch.equal(found[n], t) for n, t in tensors.items() if n != gone)


class Rows(torch.utils.data.Dataset):
    """Rows of several lengths, as the collator pads them on the right."""

    def __init__(self, count: int) -> None:
        self.rows = [ids_of(1, 5 + i)[0] for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


def collated(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    length = max(len(r["input_ids"]) for r in rows)
    parts = [
        (
            F.pad(r["input_ids"], (0, length - len(r["input_ids"]))),
            F.pad(torch.ones_like(r["input_ids"]), (0, length - len(r["input_ids"]))),
        )
        for r in rows
    ]
    ids, mask = (torch.stack(p) for p in zip(*parts))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_the_trainer_trains_evaluates_saves_and_goes_on(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    def trainer(out: str, batch: int, accumulation: int, **options: Any) -> Any:
        arguments = TrainingArguments(
            str(tmp_path / out), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=4, learning_rate=1e-3,
            use_cpu=True, report_to=[], logging_steps=1, save_steps=2, disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
            per_device_eval_batch_size=3, **options,
        )  # fmt: skip
        return Trainer(load(folders[name]), arguments, data_collator=collated, train_dataset=Rows(16), eval_dataset=Rows(6))

    def losses(done: Any) -> list[float]:
        return [row["loss"] for row in done.state.log_history if "loss" in row]

    one, two = trainer("one", 4, 1), trainer("two", 1, 4, gradient_checkpointing=True)
    one.train()
    two.train()
    assert len(losses(one)) == 4 and losses(one) == pytest.approx(losses(two), rel=1e-3)
    before = one.evaluate()["eval_loss"]
    assert one.predict(Rows(4)).predictions.shape[-1] == 269
    again = trainer("one", 4, 1)
    again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert losses(again) == pytest.approx(losses(one), rel=1e-3)  # the log goes on from the first run's
    assert again.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-3)
    saved = load(tmp_path / "one" / "checkpoint-4").eval()
    ids = ids_of(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, again.model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
