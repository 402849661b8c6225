"""Configuration of an exported Everywhen model: the mixer of each layer, by a pattern that repeats over the depth."""

from transformers import PreTrainedConfig


class EverywhenConfig(PreTrainedConfig):
    """pattern: names of mixers; mixers: the settings of each name. intermediate_size 0: no MLP. norm_after: mixers whose blocks normalise what
    their sublayers give; centred_norms: norms hold what their gains are above 1; depth: another way than once through each layer."""

    model_type = "everywhen"

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    intermediate_size: int = 0
    rms_norm_eps: float = 1e-5
    pattern: list | None = None
    mixers: dict | None = None
    depth: dict | None = None
    learnable_residual: bool = False
    centred_norms: bool = False
    norm_after: list | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
