"""What a run costs: FLOPs, utilisation and memory, from the layers' own formulae, before and during training.

Model FLOPs of training are 3x the forward pass; what is computed again counts in HFU, not in MFU. Peaks are dense matrix rates from the vendors'
datasheets; an unknown device has no MFU rather than a guessed one.
"""

from __future__ import annotations

import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from models.remade import Parts, parts_by_layer
from training.config.schema import Config
from training.cost.memory import report

# Dense TFLOP/s by (part of the device's name, precision). fp32 training runs without TF32 here, hence the plain fp32 rates.
PEAKS: list[tuple[str, dict[str, float]]] = [
    ("GH200", {"bf16": 989.4, "fp32": 66.9}),
    ("H200", {"bf16": 989.4, "fp32": 66.9}),
    ("H100 PCIe", {"bf16": 756.0, "fp32": 51.0}),
    ("H100 NVL", {"bf16": 835.0, "fp32": 60.0}),
    ("H100", {"bf16": 989.4, "fp32": 66.9}),
    ("B200", {"bf16": 2250.0, "fp32": 75.0}),
    ("A100", {"bf16": 312.0, "fp32": 19.5}),
    ("L40S", {"bf16": 362.0, "fp32": 91.6}),
    ("RTX 4090", {"bf16": 165.2, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71.0, "fp32": 35.6}),
    ("V100", {"fp32": 15.7}),
]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of the named device, or None when it is not in the table."""
    for part, rates in PEAKS:
        if part in name:
            return rates[precision] * 1e12 if precision in rates else None
    return None


def training_flops_per_token(model: LanguageModel, seq_len: int) -> int:
    return model.training_flops_per_token(seq_len)


def meta_model(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config)


def dry_run_report(config: Config, model_config: ModelConfig, note: str = "") -> str:
    """What dry_run=true prints: parameters by part, FLOPs, memory by ZeRO stage and world size, tokens and steps."""
    model = meta_model(model_config)
    remade, chosen = _recomputation(config, model_config, model)
    model.set_activation_checkpointing(remade)
    counts = model.parameter_counts()
    total = sum(counts.values())
    flops = training_flops_per_token(model, config.train.seq_len)
    tokens = config.total_steps * config.tokens_per_step
    lines = [
        f"{config.name}: {total:,} parameters, {model_config.n_layers} layers of width {model_config.d_model}, vocabulary {model_config.vocab_size:,}{note}"
    ]
    lines += [f"  {part:<24}{count:>16,}  {100 * count / total:5.1f} %" for part, count in counts.items()]
    lines += [
        f"training FLOPs per token at T={config.train.seq_len}: {flops:.3e} (3x forward)",
        again_line(model, config.train.seq_len, config.train.compile),
        f"steps {config.total_steps:,} of {config.tokens_per_step:,} tokens: {tokens:.3e} tokens, {tokens * flops:.3e} FLOPs",
        f"state carried per sequence at T={config.train.seq_len}: {model.state_bytes(config.train.seq_len) / 2**20:.2f} MiB",
    ]
    return "\n".join(lines + chosen + report(config, model_config, model, remade))


def again_line(model: LanguageModel, seq_len: int, compiled: bool) -> str:
    """What recomputation adds to the FLOPs of training, in words."""
    flops, again = training_flops_per_token(model, seq_len), model.recomputed_flops_per_token(seq_len, compiled)
    return f"computed again in the backward pass: {again:.3e} FLOPs per token, so that HFU is {1 + again / flops:.3f} times MFU"


def _recomputation(config: Config, settings: ModelConfig, model: LanguageModel) -> tuple[list[Parts], list[str]]:
    """(what each layer computes again, how auto has come to it)."""
    if config.train.activation_checkpointing != "auto":
        return parts_by_layer(config.train.activation_checkpointing, settings), []
    from training.cost import recomputation

    room, whose = recomputation.dry_budget(config)
    chosen = recomputation.choose(config, settings, model, config.parallel.sequence, room)
    return chosen.parts, [f"{recomputation.told(chosen, room)}, of {whose}"]
