"""Qwen3: a decoder with grouped-query attention and normalised queries and keys, dense or with a mixture of experts.

    embeddings -> blocks(RMSNorm, grouped-query attention, RMSNorm, MLP or MoE) -> norm -> head

Source: Qwen3, arXiv:2505.09388; sizes from the published config.json of each checkpoint.
Matches: transformers' qwen3 and qwen3_moe with the same weights, to 1e-5 relative in fp32. Published weights were not
run.
"""

from __future__ import annotations

from vlkit.config import Config, Count, Depth, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.keymap import KeyMap, rename, stack
from vlkit.layers.gqa import GroupedQueryAttention
from vlkit.layers.mlp import GatedMLP
from vlkit.layers.moe import Experts, MoE, Router, check_routing
from vlkit.llm.decoder import Decoder, DecoderBlock
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
    max_positions: Size = 40960
    norm_eps: Positive = 1e-6
    tied: bool = True

    def check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"Qwen3Config: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"Qwen3Config: head_dim={self.head_dim} is odd; rotary embedding turns pairs of channels")
        if self.num_experts:
            check_routing(self.num_experts, self.top_k)


def build_qwen3(config: Qwen3Config) -> Decoder:
    """The decoder with these sizes; its cache keeps keys and values of every key head."""
    return Decoder(
        config,
        [_block(config) for _ in range(config.num_layers)],
        rotary_dim=config.head_dim,
        cache_rows=((config.num_kv_heads, config.head_dim),) * 2,
    )


def _block(config: Qwen3Config) -> DecoderBlock:
    attn = GroupedQueryAttention(
        config.dim,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        qkv_bias=config.qkv_bias,
        qk_norm_eps=config.norm_eps,
    )
    mlp: GatedMLP | MoE
    if config.num_experts:
        router = Router(config.dim, config.num_experts, top_k=config.top_k, normalize=config.normalize)
        mlp = MoE(router, Experts(config.dim, config.expert_dim, config.num_experts))
    else:
        mlp = GatedMLP(config.dim, config.mlp_dim)
    return DecoderBlock(config.dim, attn, mlp, norm_eps=config.norm_eps)


def keys(config: Qwen3Config) -> KeyMap:
    """Names of the Qwen/Qwen3-* checkpoints. A tied head is ignored where a file has a copy, and not written."""
    layer = "model.layers.{layer}."
    projections = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return KeyMap(
        rename("model.embed_tokens.weight", "embedding.weight"),
        rename(layer + "input_layernorm.weight", "blocks.{layer}.norm1.weight"),
        rename(
            layer + "self_attn.{name}.{kind}",
            "blocks.{layer}.attn.{name}.{kind}",
            name={"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "q_norm": "q_norm", "k_norm": "k_norm"},
        ),
        rename(layer + "post_attention_layernorm.weight", "blocks.{layer}.norm2.weight"),
        rename(layer + "mlp.{name}.weight", "blocks.{layer}.mlp.{name}.weight", name=projections),
        rename(layer + "mlp.gate.weight", "blocks.{layer}.mlp.router.weight"),
        stack(layer + "mlp.experts.{expert}.{name}.weight", "blocks.{layer}.mlp.experts.{name}", name=projections),
        rename("model.norm.weight", "norm.weight"),
        rename("lm_head.weight", "lm_head.weight", optional=config.tied),
    )


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
        "qwen3-30b-a3b": Qwen3Config(
            dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, mlp_dim=6144, num_experts=128, tied=False
        ),
        "qwen3-235b-a22b": Qwen3Config(
            dim=4096,
            num_layers=94,
            num_heads=64,
            num_kv_heads=4,
            mlp_dim=12288,
            num_experts=128,
            expert_dim=1536,
            tied=False,
        ),
        "qwen3-tiny": _TINY,
        "qwen3-moe-tiny": _TINY.replace(num_experts=5, top_k=2, expert_dim=24, tied=False),
    },
)
