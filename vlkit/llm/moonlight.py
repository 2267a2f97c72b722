"""Moonlight: a DeepSeek-V3 style decoder with latent attention and a mixture of experts, the language model of Kimi-VL.

    embeddings -> blocks(RMSNorm, latent attention, RMSNorm, MLP in the first layers and MoE in the rest) -> norm -> head

Source: Moonlight, arXiv:2502.16982; architecture: DeepSeek-V3, arXiv:2412.19437; Kimi-VL, arXiv:2504.07491.
Matches: transformers' deepseek_v3 with the same weights, to 1e-5 relative in fp32. Published weights were not run.
"""

from __future__ import annotations

from vlkit.config import Config, Count, Depth, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, drop, rename, stack
from vlkit.layers.mla import LatentAttention
from vlkit.layers.mlp import GatedMLP
from vlkit.layers.moe import Experts, MoE, Router, check_routing
from vlkit.llm.decoder import Decoder, DecoderBlock
from vlkit.llm.grouped_query import LAYER, PROJECTIONS, llama_keys
from vlkit.llm.rope import FixedRope, read_theta
from vlkit.registry import register_component


class MoonlightConfig(Config):
    """Sizes of a Moonlight decoder; the defaults are those of Moonlight-16B-A3B.

    Attributes:
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Attention heads.
        kv_rank: Width of the latent that keys and values are made from.
        nope_dim: Channels per head of q and k without position.
        rope_dim: Channels per head of q and k that are rotated; even.
        value_dim: Channels per head of v.
        mlp_dim: Hidden width of the MLP of the first layers.
        num_dense_layers: First layers that have an MLP; all others have experts.
        num_experts: Routed experts per layer.
        top_k: Routed experts per token.
        expert_dim: Hidden width of one expert.
        num_shared_experts: Experts that every token uses, as one MLP of their joint width.
        num_groups: Groups that the experts are cut into for the choice.
        top_groups: Groups that one token may use.
        normalize: Whether the weights of the chosen experts are divided by their sum.
        routed_scale: Factor of the routed experts' weights, after normalizing.
        theta: Base of the rotary wavelengths.
        max_positions: Longest sequence, in tokens.
        norm_eps: Added to the mean square in the norms of blocks and output.
        kv_norm_eps: The same in the norm of the latent, which published code leaves at its default.
        tied: Whether the head is the embedding's matrix.
    """

    vocab_size: Size = 163840
    dim: Size = 2048
    num_layers: Depth = 27
    num_heads: Size = 16
    kv_rank: Size = 512
    nope_dim: Size = 128
    rope_dim: Size = 64
    value_dim: Size = 128
    mlp_dim: Size = 11264
    num_dense_layers: Count = 1
    num_experts: Size = 64
    top_k: Size = 6
    expert_dim: Size = 1408
    num_shared_experts: Count = 2
    num_groups: Size = 1
    top_groups: Size = 1
    normalize: bool = True
    routed_scale: Positive = 2.446
    theta: Positive = 50000.0
    max_positions: Size = 8192
    norm_eps: Positive = 1e-5
    kv_norm_eps: Positive = 1e-6
    tied: bool = False

    def check(self) -> None:
        check_routing(self.num_experts, self.top_k, self.num_groups, self.top_groups)
        if self.rope_dim % 2:
            raise ConfigError(
                f"MoonlightConfig: rope_dim={self.rope_dim} is odd; rotary embedding turns pairs of channels"
            )
        if self.num_dense_layers > self.num_layers:
            raise ConfigError(
                f"MoonlightConfig: num_dense_layers={self.num_dense_layers} is more than num_layers={self.num_layers}"
            )


def build_moonlight(config: MoonlightConfig) -> Decoder:
    """The decoder with these sizes; its cache keeps one latent and one rotated key per token."""
    return Decoder(
        config,
        [_block(config, layer) for layer in range(config.num_layers)],
        rope=FixedRope(config.rope_dim, config.theta),
        cache_rows=((config.kv_rank + config.rope_dim,),),
    )


def _block(config: MoonlightConfig, layer: int) -> DecoderBlock:
    attn = LatentAttention(
        config.dim,
        config.num_heads,
        kv_rank=config.kv_rank,
        nope_dim=config.nope_dim,
        rope_dim=config.rope_dim,
        value_dim=config.value_dim,
        kv_norm_eps=config.kv_norm_eps,
    )
    mlp = GatedMLP(config.dim, config.mlp_dim) if layer < config.num_dense_layers else _moe(config)
    return DecoderBlock(config.dim, attn, mlp, norm_eps=config.norm_eps)


def _moe(config: MoonlightConfig) -> MoE:
    router = Router(
        config.dim,
        config.num_experts,
        top_k=config.top_k,
        scoring="sigmoid",
        selection_bias=True,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        normalize=config.normalize,
        scale=config.routed_scale,
    )
    shared_dim = config.num_shared_experts * config.expert_dim
    shared = GatedMLP(config.dim, shared_dim) if shared_dim else None
    return MoE(router, Experts(config.dim, config.expert_dim, config.num_experts), shared)


def read_config(text: HubFields, *, tied: bool = False) -> MoonlightConfig:
    """The sizes in a config.json of model_type deepseek_v3 whose queries have no latent.

    Args:
        text: The fields of the language model.
        tied: Whether the head is the embedding where the file does not say it.

    Raises:
        ConfigError: A field is missing, or holds a value that this decoder would ignore.
    """
    text.expect("num_key_value_heads", text.take("num_attention_heads"))
    for name, supported in (
        ("q_lora_rank", None),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
        ("rope_interleave", True),
    ):
        text.expect(name, supported)
    return MoonlightConfig(
        vocab_size=text.take("vocab_size"),
        dim=text.take("hidden_size"),
        num_layers=text.take("num_hidden_layers"),
        num_heads=text.take("num_attention_heads"),
        kv_rank=text.take("kv_lora_rank"),
        nope_dim=text.take("qk_nope_head_dim"),
        rope_dim=text.take("qk_rope_head_dim"),
        value_dim=text.take("v_head_dim"),
        mlp_dim=text.take("intermediate_size"),
        num_dense_layers=text.take("first_k_dense_replace"),
        num_experts=text.take("n_routed_experts"),
        top_k=text.take("num_experts_per_tok"),
        num_shared_experts=text.take("n_shared_experts"),
        expert_dim=text.take("moe_intermediate_size"),
        num_groups=text.take("n_group", 1),
        top_groups=text.take("topk_group", 1),
        normalize=text.take("norm_topk_prob"),
        routed_scale=text.take("routed_scaling_factor"),
        theta=read_theta(text),
        max_positions=text.take("max_position_embeddings"),
        norm_eps=text.take("rms_norm_eps"),
        tied=text.take("tie_word_embeddings", tied),
    )


def keys(config: MoonlightConfig) -> KeyMap:
    """Names of moonshotai/Moonlight-16B-A3B; in Kimi-VL the same under `language_model.`.

    Rotary frequencies that older files carry are ignored. A tied head is neither needed nor written.
    """
    return llama_keys(tied=config.tied) + KeyMap(
        rename(
            LAYER + "self_attn.{name}.weight",
            "blocks.{layer}.attn.{name}.weight",
            name={"kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up"},
        ),
        drop(LAYER + "self_attn.rotary_emb.inv_freq"),
        rename(LAYER + "mlp.gate.weight", "blocks.{layer}.mlp.router.weight"),
        rename(LAYER + "mlp.gate.e_score_correction_bias", "blocks.{layer}.mlp.router.bias"),
        stack(LAYER + "mlp.experts.{expert}.{name}.weight", "blocks.{layer}.mlp.experts.{name}", name=PROJECTIONS),
        rename(LAYER + "mlp.shared_experts.{name}.weight", "blocks.{layer}.mlp.shared.{name}.weight", name=PROJECTIONS),
    )


register_component(
    "llm",
    MoonlightConfig,
    build_moonlight,
    {
        "moonlight": MoonlightConfig(),
        "moonlight-16b-a3b": MoonlightConfig(),
        "moonlight-kimi-vl": MoonlightConfig(theta=800000.0, max_positions=131072),
        "moonlight-tiny": MoonlightConfig(
            vocab_size=320,
            dim=32,
            num_layers=2,
            num_heads=3,
            kv_rank=20,
            nope_dim=6,
            rope_dim=4,
            value_dim=10,
            mlp_dim=56,
            num_experts=5,
            top_k=2,
            expert_dim=24,
            num_shared_experts=1,
            theta=800000.0,
            max_positions=4096,
        ),
    },
)
