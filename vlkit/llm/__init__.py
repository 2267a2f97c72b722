"""Decoders: `build_NAME(config)` gives a Decoder, `decoder(embeddings: Packed, cache=...) -> DecoderOutput`, one file each."""

from vlkit.llm.decoder import Decoder
from vlkit.llm.grouped_query import grouped_query_decoder
from vlkit.llm.llama import LlamaConfig, build_llama
from vlkit.llm.moonlight import MoonlightConfig, build_moonlight
from vlkit.llm.output import DecoderOutput, Deep
from vlkit.llm.qwen import QwenConfig, build_qwen
from vlkit.llm.qwen2 import Qwen2Config, build_qwen2
from vlkit.llm.qwen3 import Qwen3Config, build_qwen3
from vlkit.llm.rope import DynamicRope, FixedRope, Rope
from vlkit.llm.starting_points import decoder_config, load_decoder

__all__ = [
    "Decoder",
    "DecoderOutput",
    "Deep",
    "DynamicRope",
    "FixedRope",
    "LlamaConfig",
    "MoonlightConfig",
    "Qwen2Config",
    "Qwen3Config",
    "QwenConfig",
    "Rope",
    "build_llama",
    "build_moonlight",
    "build_qwen",
    "build_qwen2",
    "build_qwen3",
    "decoder_config",
    "grouped_query_decoder",
    "load_decoder",
]
