"""LLaMA: the plain decoder with grouped-query attention; SmolLM2 is one.

    embeddings -> blocks(RMSNorm, grouped-query attention, RMSNorm, gated MLP) -> norm -> head

Source: LLaMA, arXiv:2302.13971 and, for grouped queries, arXiv:2307.09288; SmolLM2, arXiv:2502.02737.
Matches: transformers' llama with the same weights, to 1e-5 relative in fp32; SmolLM2-135M-Instruct's quantised weights
give its published answers.
"""

from __future__ import annotations

from vlkit.config import Config, Depth, Positive, Size
from vlkit.hub.fields import HubFields
from vlkit.hub.keymap import KeyMap, drop
from vlkit.llm.decoder import Decoder
from vlkit.llm.grouped_query import LAYER, check_heads, grouped_query_decoder, llama_keys, read_head_dim, read_sizes
from vlkit.llm.rope import FixedRope
from vlkit.registry import register_component


class LlamaConfig(Config):
    """Sizes of a LLaMA decoder; the defaults are those of SmolLM2-135M.

    Attributes:
        vocab_size: Rows of the embedding.
        dim: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Query heads; a multiple of num_kv_heads.
        num_kv_heads: Key and value heads.
        head_dim: Channels of a head; even.
        mlp_dim: Hidden width of the MLP.
        theta: Base of the rotary wavelengths.
        max_positions: Longest sequence, in tokens.
        norm_eps: Added to the mean square in every norm.
        tied: Whether the head is the embedding's matrix.
    """

    vocab_size: Size = 49152
    dim: Size = 576
    num_layers: Depth = 30
    num_heads: Size = 9
    num_kv_heads: Size = 3
    head_dim: Size = 64
    mlp_dim: Size = 1536
    theta: Positive = 100000.0
    max_positions: Size = 8192
    norm_eps: Positive = 1e-5
    tied: bool = True

    def check(self) -> None:
        check_heads(self)


def build_llama(config: LlamaConfig) -> Decoder:
    """The decoder with these sizes; its cache keeps keys and values of every key head."""
    return grouped_query_decoder(config, rope=FixedRope(config.head_dim, config.theta))


def read_config(text: HubFields, *, tied: bool = False) -> LlamaConfig:
    """The sizes in a config.json of model_type llama, or mistral without a sliding window.

    Args:
        text: The fields of the language model.
        tied: Whether the head is the embedding where the file does not say it.

    Raises:
        ConfigError: A field is missing, or holds a value that this decoder would ignore.
    """
    if text.take("model_type", "llama") == "mistral":
        text.take("sliding_window")  # transformers takes a file without it for one of 4096 tokens
        text.expect("sliding_window", None)
    text.expect("mlp_bias", False)
    text.expect("rope_interleaved", False)
    sizes = read_sizes(text, 10000.0)  # the first models, whose files do not say the base
    return LlamaConfig(
        **sizes,
        num_kv_heads=text.take("num_key_value_heads", sizes["num_heads"]),
        head_dim=read_head_dim(text),
        tied=text.take("tie_word_embeddings", tied),
    )


def keys(config: LlamaConfig) -> KeyMap:
    """Names of published LLaMA-style checkpoints. Rotary frequencies that older files carry are ignored."""
    return llama_keys(tied=config.tied) + KeyMap(drop(LAYER + "self_attn.rotary_emb.inv_freq"))


register_component(
    "llm",
    LlamaConfig,
    build_llama,
    {
        "llama": LlamaConfig(),
        "smollm2-135m": LlamaConfig(),
        "llama-tiny": LlamaConfig(
            vocab_size=320,
            dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=10,
            mlp_dim=56,
            max_positions=4096,
        ),
    },
)
