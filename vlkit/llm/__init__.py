"""Decoders: `Decoder(config)(embeddings: Packed, cache=...) -> DecoderOutput`, one file each."""

from vlkit.llm.moonlight import Moonlight, MoonlightConfig
from vlkit.llm.output import DecoderOutput
from vlkit.llm.qwen3 import Qwen3, Qwen3Config

__all__ = ["DecoderOutput", "Moonlight", "MoonlightConfig", "Qwen3", "Qwen3Config"]
