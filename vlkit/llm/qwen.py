"""Qwen: the first Qwen decoder, with full attention and wavelengths that follow the prompt; the language model of Qwen-VL.

    embeddings -> blocks(RMSNorm, attention with biases of q, k and v, RMSNorm, gated MLP) -> norm -> head

In eval mode, beyond the trained length, DynamicRope lengthens the rotary wavelengths and scales the queries.

Source: Qwen, arXiv:2309.16609; Qwen-VL, arXiv:2308.12966; the remote code of Qwen-VL-Chat.
Matches: logits of the remote code at toy sizes, below and beyond the trained length, to 1e-5. Published weights were not
run.
"""

from __future__ import annotations

from vlkit.config import Config, Depth, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, rename, split
from vlkit.llm.decoder import Decoder
from vlkit.llm.grouped_query import check_heads, grouped_query_decoder
from vlkit.llm.rope import DynamicRope
from vlkit.registry import register_component


class QwenConfig(Config):
    """Sizes of a Qwen decoder; the defaults are those of Qwen-VL.

    Attributes:
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Attention heads, of queries and keys alike.
        head_dim: Channels of a head; even.
        mlp_dim: Hidden width of the MLP: the rows of one matrix, half of what published configs call intermediate_size.
        theta: Base of the rotary wavelengths of prompts up to the trained length.
        trained_length: Longest sequence in training, in tokens; published as seq_length.
        grow_wavelengths: Whether longer prompts have longer wavelengths; published as use_dynamic_ntk.
        grow_queries: Whether queries beyond the trained length are scaled; published as use_logn_attn.
        max_positions: Longest sequence, in tokens.
        norm_eps: Added to the mean square in every norm.
        tied: Whether the head is the embedding's matrix.
    """

    vocab_size: Size = 151936
    dim: Size = 4096
    num_layers: Depth = 32
    num_heads: Size = 32
    head_dim: Size = 128
    mlp_dim: Size = 11008
    theta: Positive = 10000.0
    trained_length: Size = 2048
    grow_wavelengths: bool = True
    grow_queries: bool = True
    max_positions: Size = 8192
    norm_eps: Positive = 1e-6
    tied: bool = False

    def check(self) -> None:
        check_heads(self)
        if self.trained_length < 2 or self.head_dim < 4:
            raise ConfigError(
                f"QwenConfig: trained_length={self.trained_length} and head_dim={self.head_dim}; the rules for longer "
                "prompts need at least 2 tokens and 4 channels"
            )

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads: every query head has its own."""
        return self.num_heads


def build_qwen(config: QwenConfig) -> Decoder:
    """The decoder with these sizes; its cache keeps keys and values of every head."""
    rope = DynamicRope(
        config.head_dim,
        config.theta,
        config.trained_length,
        grow_wavelengths=config.grow_wavelengths,
        grow_queries=config.grow_queries,
    )
    return grouped_query_decoder(config, rope=rope, qkv_bias=True)


def read_config(text: HubFields, *, tied: bool = False) -> QwenConfig:
    """The sizes in a config.json of model_type qwen.

    Args:
        text: The fields of the language model.
        tied: Whether the head is the embedding where the file does not say it.

    Raises:
        ConfigError: A field is missing, or holds a value that this decoder would ignore.
    """
    for name, supported in (("rotary_pct", 1.0), ("no_bias", True), ("scale_attn_weights", True)):
        text.expect(name, supported)
    doubled = text.take("intermediate_size")  # both of the MLP's matrices before its product
    if not isinstance(doubled, int) or doubled % 2:
        raise ConfigError(f"{text.where}.intermediate_size: expected an even number, found {doubled!r}")
    config = QwenConfig(
        vocab_size=text.take("vocab_size"),
        dim=text.take("hidden_size"),
        num_layers=text.take("num_hidden_layers"),
        num_heads=text.take("num_attention_heads"),
        head_dim=text.take("kv_channels"),
        mlp_dim=doubled // 2,
        theta=text.take("rotary_emb_base"),
        trained_length=text.take("seq_length"),
        grow_wavelengths=text.take("use_dynamic_ntk"),
        grow_queries=text.take("use_logn_attn"),
        max_positions=text.take("max_position_embeddings"),
        norm_eps=text.take("layer_norm_epsilon"),
        tied=text.take("tie_word_embeddings", tied),
    )
    if config.num_heads * config.head_dim != config.dim:
        raise ConfigError(
            f"{text.where}: {config.num_heads} heads of kv_channels={config.head_dim} are not hidden_size={config.dim}, as "
            "the published code needs"
        )
    return config


def keys(config: QwenConfig) -> KeyMap:
    """Names of Qwen/Qwen-VL and Qwen/Qwen-7B. There w2 is the gate and w1 what it multiplies."""
    layer = "transformer.h.{layer}."
    return KeyMap(
        rename("transformer.wte.weight", "embedding.weight"),
        rename(layer + "ln_{norm}.weight", "blocks.{layer}.norm{norm}.weight", norm=("1", "2")),
        split(layer + "attn.c_attn.{kind}", "blocks.{layer}.attn.{part}.{kind}", part=("q", "k", "v")),
        rename(layer + "attn.c_proj.weight", "blocks.{layer}.attn.out.weight"),
        rename(
            layer + "mlp.{name}.weight",
            "blocks.{layer}.mlp.{name}.weight",
            name={"w2": "gate", "w1": "up", "c_proj": "down"},
        ),
        rename("transformer.ln_f.weight", "norm.weight"),
        rename("lm_head.weight", "lm_head.weight", optional=config.tied),
    )


register_component(
    "llm",
    QwenConfig,
    build_qwen,
    {
        "qwen": QwenConfig(),
        "qwen-vl": QwenConfig(),
        "qwen-7b": QwenConfig(trained_length=8192, max_positions=32768),
        "qwen-tiny": QwenConfig(
            vocab_size=320, dim=32, num_layers=2, num_heads=3, head_dim=10, mlp_dim=56, max_positions=8192
        ),
    },
)
