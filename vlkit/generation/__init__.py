"""Decoding: from a packed batch to new tokens."""

from vlkit.generation.decode import generate
from vlkit.generation.sampling import Sampler
from vlkit.generation.settings import GenerationSettings, read_generation_settings

__all__ = ["GenerationSettings", "Sampler", "generate", "read_generation_settings"]
