"""Decoders: `build_NAME(config)` gives a Decoder, `decoder(embeddings: Packed, cache=...) -> DecoderOutput`, one file each."""

from vlkit.llm.decoder import Decoder
from vlkit.llm.moonlight import MoonlightConfig, build_moonlight
from vlkit.llm.output import DecoderOutput
from vlkit.llm.qwen3 import Qwen3Config, build_qwen3

__all__ = ["Decoder", "DecoderOutput", "MoonlightConfig", "Qwen3Config", "build_moonlight", "build_qwen3"]
