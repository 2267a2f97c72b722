"""Blocks that towers, projectors and decoders share. Each takes plain keyword arguments and knows no family."""
