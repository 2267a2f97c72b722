"""Losses."""

from vlkit.objectives.cross_entropy import chunked_cross_entropy, next_token_targets

__all__ = ["chunked_cross_entropy", "next_token_targets"]
