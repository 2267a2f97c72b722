"""What decoders with grouped-query attention share: LLaMA, Qwen2 and Qwen3 differ in biases, norms of q and k, and experts.

grouped_query_decoder(config, qkv_bias=..., qk_norm=..., ...) -> Decoder
llama_keys(tied)                                              -> the names that all of them are published under
read_sizes(text), read_head_dim(text)                         -> what their config.json say alike
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, rename
from vlkit.layers.gqa import GroupedQueryAttention
from vlkit.layers.mlp import GatedMLP
from vlkit.layers.rope import rotary_sections
from vlkit.llm.decoder import Decoder, DecoderBlock, DecoderConfig
from vlkit.llm.rope import FixedRope, Rope, read_theta


class GroupedQueryConfig(DecoderConfig, Protocol):
    """The fields that the config of a decoder with grouped-query attention has."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def theta(self) -> float: ...


def check_heads(config: GroupedQueryConfig) -> None:
    """Refuse heads that cannot share keys or be rotated.

    Raises:
        ConfigError: num_heads is not a multiple of num_kv_heads, or head_dim is odd.
    """
    name = type(config).__name__
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{name}: num_heads={config.num_heads} is not a multiple of num_kv_heads={config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ConfigError(f"{name}: head_dim={config.head_dim} is odd; rotary embedding turns pairs of channels")


def sectioned_rope(
    head_dim: int, theta: float, sections: tuple[int, int, int] | None, *, interleaved: bool = False
) -> FixedRope:
    """Rotary angles with the pairs of channels shared between time, rows and columns, or not shared where sections is None.

    Raises:
        ConfigError: Sections that do not sum to head_dim / 2, or cannot be interleaved.
    """
    if sections is None:
        return FixedRope(head_dim, theta)
    if 2 * sum(sections) != head_dim:
        raise ConfigError(
            f"rope_sections {sections} sum to {sum(sections)}; head_dim={head_dim} has {head_dim // 2} pairs"
        )
    return FixedRope(head_dim, theta, rotary_sections(sections, interleaved=interleaved))


def grouped_query_decoder(
    config: GroupedQueryConfig,
    *,
    rope: Rope,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    mlp: Callable[[], nn.Module] | None = None,
) -> Decoder:
    """The decoder with these sizes; its cache keeps keys and values of every key head.

    Args:
        config: Sizes.
        rope: Makes rotary angles of positions.
        qkv_bias: Biases of the q, k and v projections; the output projection has none.
        qk_norm: Whether q and k pass an RMSNorm over each head.
        mlp: Makes the feed-forward part of one block; None makes a gated MLP.
    """

    def block() -> DecoderBlock:
        attn = GroupedQueryAttention(
            config.dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=qkv_bias,
            qk_norm_eps=config.norm_eps if qk_norm else None,
        )
        made = GatedMLP(config.dim, config.mlp_dim) if mlp is None else mlp()
        return DecoderBlock(config.dim, attn, made, norm_eps=config.norm_eps)

    return Decoder(
        config,
        [block() for _ in range(config.num_layers)],
        rope=rope,
        cache_rows=((config.num_kv_heads, config.head_dim),) * 2,
    )


def read_sizes(text: HubFields, *theta: float) -> dict[str, Any]:
    """What the config.json of such decoders say alike, as fields of our configs.

    Args:
        text: The fields of the language model.
        theta: Base of the rotary wavelengths of a file that does not say it.

    Raises:
        ConfigError: A field is missing, or holds a value that these decoders would ignore.
    """
    text.expect("hidden_act", "silu")
    text.expect("attention_bias", False)
    text.expect("use_sliding_window", False, None)
    kinds = text.take("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{text.where}.layer_types: {kinds!r} is not supported, only 'full_attention' in every layer")
    return {
        "vocab_size": text.take("vocab_size"),
        "dim": text.take("hidden_size"),
        "num_layers": text.take("num_hidden_layers"),
        "num_heads": text.take("num_attention_heads"),
        "mlp_dim": text.take("intermediate_size"),
        "theta": read_theta(text, *theta),
        "max_positions": text.take("max_position_embeddings"),
        "norm_eps": text.take("rms_norm_eps"),
    }


def read_head_dim(text: HubFields) -> Any:
    """Channels of a head, which a file that does not say them makes of hidden_size."""
    stated = text.take("head_dim", None)
    if stated is not None:
        return stated
    dim, heads = text.take("hidden_size"), text.take("num_attention_heads")
    if not (isinstance(dim, int) and isinstance(heads, int) and heads > 0 and dim % heads == 0):
        raise ConfigError(f"{text.where}: hidden_size {dim!r} is not a multiple of num_attention_heads {heads!r}")
    return dim // heads


PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
LAYER = "model.layers.{layer}."


def llama_keys(*, tied: bool) -> KeyMap:
    """The names that LLaMA introduced and others kept. A tied head is ignored where a file has a copy, and not written."""
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "q_norm": "q_norm", "k_norm": "k_norm"}
    return KeyMap(
        rename("model.embed_tokens.weight", "embedding.weight"),
        rename(LAYER + "input_layernorm.weight", "blocks.{layer}.norm1.weight"),
        rename(LAYER + "self_attn.{name}.{kind}", "blocks.{layer}.attn.{name}.{kind}", name=attention),
        rename(LAYER + "post_attention_layernorm.weight", "blocks.{layer}.norm2.weight"),
        rename(LAYER + "mlp.{name}.weight", "blocks.{layer}.mlp.{name}.weight", name=PROJECTIONS),
        rename("model.norm.weight", "norm.weight"),
        rename("lm_head.weight", "lm_head.weight", optional=tied),
    )
