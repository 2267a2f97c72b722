"""Decoding: from a packed batch to new tokens."""

from vlkit.generation.decode import generate
from vlkit.generation.sampling import Sampler

__all__ = ["Sampler", "generate"]
