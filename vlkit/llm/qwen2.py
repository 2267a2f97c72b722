"""Qwen2 and Qwen2.5: a decoder with grouped-query attention and biases of q, k and v; the language model of Qwen2-VL.

    embeddings -> blocks(RMSNorm, grouped-query attention, RMSNorm, gated MLP) -> norm -> head

Source: Qwen2, arXiv:2407.10671; Qwen2-VL, arXiv:2409.12191; Qwen2.5-VL, arXiv:2502.13923; sizes from the published
config.json of each checkpoint.
Matches: transformers' qwen2 and the text model of qwen2_vl with the same weights, to 1e-5 relative in fp32. Published
weights were not run.
"""

from __future__ import annotations

from vlkit.config import Config, Depth, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap
from vlkit.llm.decoder import Decoder
from vlkit.llm.grouped_query import check_heads, grouped_query_decoder, llama_keys, read_sizes, sectioned_rope
from vlkit.llm.rope import FixedRope
from vlkit.registry import register_component


class Qwen2Config(Config):
    """Sizes of a Qwen2 decoder; the defaults are those of Qwen2-1.5B.

    Attributes:
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream; a multiple of num_heads.
        num_layers: Blocks.
        num_heads: Query heads; a multiple of num_kv_heads.
        num_kv_heads: Key and value heads.
        mlp_dim: Hidden width of the MLP.
        theta: Base of the rotary wavelengths.
        rope_sections: Pairs of rotated channels that follow time, row and column, one block after another; None for
            positions of one coordinate.
        max_positions: Longest sequence, in tokens.
        norm_eps: Added to the mean square in every norm.
        tied: Whether the head is the embedding's matrix.
    """

    vocab_size: Size = 151936
    dim: Size = 1536
    num_layers: Depth = 28
    num_heads: Size = 12
    num_kv_heads: Size = 2
    mlp_dim: Size = 8960
    theta: Positive = 1000000.0
    rope_sections: tuple[Size, Size, Size] | None = None
    max_positions: Size = 32768
    norm_eps: Positive = 1e-6
    tied: bool = True

    def check(self) -> None:
        if self.dim % self.num_heads:
            raise ConfigError(f"Qwen2Config: dim={self.dim} is not a multiple of num_heads={self.num_heads}")
        check_heads(self)
        _rope(self)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.num_heads


def build_qwen2(config: Qwen2Config) -> Decoder:
    """The decoder with these sizes; its cache keeps keys and values of every key head."""
    return grouped_query_decoder(config, rope=_rope(config), qkv_bias=True)


def _rope(config: Qwen2Config) -> FixedRope:
    return sectioned_rope(config.head_dim, config.theta, config.rope_sections)


def read_config(text: HubFields, *, tied: bool = False) -> Qwen2Config:
    """The sizes in a config.json of model_type qwen2, as those of Qwen2.5 are.

    Args:
        text: The fields of the language model.
        tied: Whether the head is the embedding where the file does not say it.

    Raises:
        ConfigError: A field is missing, or holds a value that this decoder would ignore.
    """
    sizes = read_sizes(text)
    config = Qwen2Config(
        **sizes,
        num_kv_heads=text.take("num_key_value_heads"),
        tied=text.take("tie_word_embeddings", tied),
    )
    text.expect("head_dim", config.head_dim, None)
    return config


def keys(config: Qwen2Config) -> KeyMap:
    """Names of the Qwen/Qwen2-* and Qwen/Qwen2.5-* checkpoints."""
    return llama_keys(tied=config.tied)


_1_5B = Qwen2Config()
_3B = Qwen2Config(dim=2048, num_layers=36, num_heads=16, mlp_dim=11008)
_7B = Qwen2Config(vocab_size=152064, dim=3584, num_heads=28, num_kv_heads=4, mlp_dim=18944, tied=False)
_32B = _7B.replace(dim=5120, num_layers=64, num_heads=40, num_kv_heads=8, mlp_dim=27648)
_72B = _7B.replace(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_dim=29568)
_SECTIONS = (16, 24, 24)

register_component(
    "llm",
    Qwen2Config,
    build_qwen2,
    {
        "qwen2": _1_5B,
        "qwen2-1.5b": _1_5B,
        "qwen2-vl-2b": _1_5B.replace(rope_sections=_SECTIONS),
        "qwen2-vl-7b": _7B.replace(rope_sections=_SECTIONS),
        "qwen2-vl-72b": _72B.replace(rope_sections=_SECTIONS),
        "qwen2.5-vl-3b": _3B.replace(rope_sections=_SECTIONS, max_positions=128000),
        "qwen2.5-vl-7b": _7B.replace(rope_sections=_SECTIONS, max_positions=128000),
        "qwen2.5-vl-32b": _32B.replace(rope_sections=_SECTIONS, max_positions=128000),
        "qwen2.5-vl-72b": _72B.replace(rope_sections=_SECTIONS, max_positions=128000),
        "qwen2-tiny": Qwen2Config(
            vocab_size=320,
            dim=48,
            num_layers=2,
            num_heads=3,
            num_kv_heads=1,
            mlp_dim=56,
            max_positions=4096,
        ),
    },
)
