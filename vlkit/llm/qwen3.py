"""Qwen3: a decoder with grouped-query attention and normalised queries and keys, dense or with a mixture of experts.

    embeddings -> blocks(RMSNorm, grouped-query attention, RMSNorm, MLP or MoE) -> norm -> head

Source: Qwen3, arXiv:2505.09388; sizes from the published config.json of each checkpoint.
Matches: transformers' qwen3 and qwen3_moe with the same weights, to 1e-5 relative in fp32. Published weights were not
run.
"""

from __future__ import annotations

from typing import Any

from vlkit.config import Config, Count, Depth, Positive, Size
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, rename, stack
from vlkit.layers.moe import Experts, MoE, Router, check_routing
from vlkit.llm.decoder import Decoder
from vlkit.llm.grouped_query import (
    LAYER,
    PROJECTIONS,
    check_heads,
    grouped_query_decoder,
    llama_keys,
    read_head_dim,
    read_sizes,
    sectioned_rope,
)
from vlkit.llm.rope import FixedRope
from vlkit.registry import register_component


class Qwen3Config(Config):
    """Sizes of a Qwen3 decoder; the defaults are those of Qwen3-0.6B.

    Attributes:
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Query heads; a multiple of num_kv_heads.
        num_kv_heads: Key and value heads.
        head_dim: Channels of a head; even, and not dim / num_heads in most sizes.
        mlp_dim: Hidden width of the MLP; unused with experts.
        num_experts: Experts per layer; 0 makes a dense decoder.
        top_k: Experts per token.
        expert_dim: Hidden width of one expert.
        normalize: Whether the weights of the chosen experts are divided by their sum.
        qkv_bias: Whether the q, k and v projections have biases.
        theta: Base of the rotary wavelengths.
        rope_sections: Pairs of rotated channels that follow time, row and column; None for positions of one coordinate.
        rope_interleaved: Whether these take turns, instead of one block after another.
        max_positions: Longest sequence, in tokens.
        norm_eps: Added to the mean square in every norm.
        tied: Whether the head is the embedding's matrix.
    """

    vocab_size: Size = 151936
    dim: Size = 1024
    num_layers: Depth = 28
    num_heads: Size = 16
    num_kv_heads: Size = 8
    head_dim: Size = 128
    mlp_dim: Size = 3072
    num_experts: Count = 0
    top_k: Size = 8
    expert_dim: Size = 768
    normalize: bool = True
    qkv_bias: bool = False
    theta: Positive = 1000000.0
    rope_sections: tuple[Size, Size, Size] | None = None
    rope_interleaved: bool = False
    max_positions: Size = 40960
    norm_eps: Positive = 1e-6
    tied: bool = True

    def check(self) -> None:
        check_heads(self)
        _rope(self)
        if self.num_experts:
            check_routing(self.num_experts, self.top_k)


def build_qwen3(config: Qwen3Config) -> Decoder:
    """The decoder with these sizes; its cache keeps keys and values of every key head."""

    def experts() -> MoE:
        router = Router(config.dim, config.num_experts, top_k=config.top_k, normalize=config.normalize)
        return MoE(router, Experts(config.dim, config.expert_dim, config.num_experts))

    mlp = experts if config.num_experts else None
    return grouped_query_decoder(config, rope=_rope(config), qkv_bias=config.qkv_bias, qk_norm=True, mlp=mlp)


def _rope(config: Qwen3Config) -> FixedRope:
    return sectioned_rope(config.head_dim, config.theta, config.rope_sections, interleaved=config.rope_interleaved)


def read_config(text: HubFields, *, tied: bool = False) -> Qwen3Config:
    """The sizes in a config.json of model_type qwen3 or qwen3_moe.

    Args:
        text: The fields of the language model.
        tied: Whether the head is the embedding where the file does not say it.

    Raises:
        ConfigError: A field is missing, or holds a value that this decoder would ignore.
    """
    experts: dict[str, Any] = {}
    sparse = text.take("model_type", "qwen3") == "qwen3_moe"
    if sparse:
        text.expect("decoder_sparse_step", 1)
        text.expect("mlp_only_layers", [], None)
        experts = {
            # transformers 5 writes num_local_experts
            "num_experts": text.take("num_experts" if "num_experts" in text.values else "num_local_experts"),
            "top_k": text.take("num_experts_per_tok"),
            "expert_dim": text.take("moe_intermediate_size"),
            "normalize": text.take("norm_topk_prob"),
        }
    return Qwen3Config(
        **read_sizes(text),
        **experts,
        num_kv_heads=text.take("num_key_value_heads"),
        head_dim=read_head_dim(text) if sparse else text.take("head_dim"),
        tied=text.take("tie_word_embeddings", tied),
    )


def keys(config: Qwen3Config) -> KeyMap:
    """Names of the Qwen/Qwen3-* checkpoints."""
    return llama_keys(tied=config.tied) + KeyMap(
        rename(LAYER + "mlp.gate.weight", "blocks.{layer}.mlp.router.weight"),
        stack(LAYER + "mlp.experts.{expert}.{name}.weight", "blocks.{layer}.mlp.experts.{name}", name=PROJECTIONS),
    )


_30B_A3B = Qwen3Config(dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, mlp_dim=6144, num_experts=128, tied=False)
_235B_A22B = _30B_A3B.replace(dim=4096, num_layers=94, num_heads=64, mlp_dim=12288, expert_dim=1536)
# What the decoders of Qwen3-VL have in common.
_VISION: dict[str, Any] = {
    "theta": 5000000.0,
    "max_positions": 262144,
    "rope_sections": (24, 20, 20),
    "rope_interleaved": True,
}
_VL = Qwen3Config(**_VISION)
_TINY = Qwen3Config(
    vocab_size=320,
    dim=32,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    mlp_dim=56,
    max_positions=4096,
)

register_component(
    "llm",
    Qwen3Config,
    build_qwen3,
    {
        "qwen3": Qwen3Config(),
        "qwen3-0.6b": Qwen3Config(),
        "qwen3-1.7b": Qwen3Config(dim=2048, mlp_dim=6144),
        "qwen3-4b": Qwen3Config(dim=2560, num_layers=36, num_heads=32, mlp_dim=9728),
        "qwen3-8b": Qwen3Config(dim=4096, num_layers=36, num_heads=32, mlp_dim=12288, tied=False),
        "qwen3-30b-a3b": _30B_A3B,
        "qwen3-235b-a22b": _235B_A22B,
        "qwen3-vl-2b": _VL.replace(dim=2048, mlp_dim=6144),
        "qwen3-vl-4b": _VL.replace(dim=2560, num_layers=36, num_heads=32, mlp_dim=9728),
        "qwen3-vl-8b": _VL.replace(dim=4096, num_layers=36, num_heads=32, mlp_dim=12288, tied=False),
        "qwen3-vl-32b": _VL.replace(dim=5120, num_layers=64, num_heads=64, mlp_dim=25600, tied=False),
        "qwen3-vl-30b-a3b": _30B_A3B.replace(**_VISION),
        "qwen3-vl-235b-a22b": _235B_A22B.replace(**_VISION),
        "qwen3-tiny": _TINY,
        "qwen3-moe-tiny": _TINY.replace(num_experts=5, top_k=2, expert_dim=24, tied=False),
    },
)
