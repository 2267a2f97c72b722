"""Several streams in given shares of the tokens.

    share of every stream at a progress -> the stream furthest below its share -> its next sample -> tokens -> shares

Shares are of tokens, because samples of long streams are few: a quarter of the samples may be nearly all of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlkit.errors import ConfigError
from vlkit.training.order import Draw, Order

Share = float | Sequence[Sequence[float]]
"""A number, or points (progress, number) with straight lines between them and level ends. Relative to the other streams."""
PATIENCE = 8
"""Draws in a row that come to nothing, before a stream waits for another one to have its turn."""


class Mixture:
    """Draws from streams so that each has its share of the tokens. One stream alone is its own order.

    A token drawn at some progress gives every stream its share of that token as credit, and the stream drawn from pays it.
    The next draw is from the stream with the most credit, so that after any number of tokens no stream is further from the
    sum of its shares than about the longest sample; where shares change, what was drawn before is not made up for. A stream of
    which nothing can be used does not keep the others from theirs: after some draws for nothing it lets another one go first.

    Args:
        sizes: Samples of every stream.
        shares: Of every stream; None for equal shares.
        seed: Of the orders.
        shuffle: Draw a new order for every epoch of a stream.

    Raises:
        ConfigError: An empty stream, or shares that are not such numbers or all 0 somewhere.
    """

    needs_outcome = False

    def __init__(
        self, sizes: Sequence[int], shares: Sequence[Share] | None = None, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if not sizes:
            raise ConfigError("a mixture needs at least one stream")
        for number, size in enumerate(sizes):
            if size < 1:
                raise ConfigError(f"stream {number} has no samples")
        self._shares = [_points(share, number) for number, share in enumerate(shares or [1.0] * len(sizes))]
        if len(self._shares) != len(sizes):
            raise ConfigError(f"{len(self._shares)} shares for {len(sizes)} streams")
        for progress in sorted({place for places, _ in self._shares for place in places}):
            if not any(self._weights(progress)):
                raise ConfigError(
                    f"data.streams: at progress {progress:g} the shares of all streams are 0, so nothing can be drawn; give "
                    "one a share there"
                )
        self.seed = seed
        self.orders = [Order(size, seed=seed, stream=number, shuffle=shuffle) for number, size in enumerate(sizes)]
        self.drawn = [0] * len(sizes)
        self.tokens = [0] * len(sizes)
        self._credit = [0.0] * len(sizes)
        self._failed = [0] * len(sizes)  # draws in a row that came to nothing

    @property
    def needs_tokens(self) -> bool:
        return len(self.orders) > 1

    def shares(self, progress: float) -> list[float]:
        """The share of every stream at a progress; their sum is 1."""
        weights = self._weights(progress)
        total = sum(weights)
        return [weight / total for weight in weights]

    def next(self, progress: float) -> Draw:
        """The next sample of the stream furthest below its share, among those with a share now; of equal ones the first."""
        open_now = [number for number, weight in enumerate(self._weights(progress)) if weight > 0]
        useful = [number for number in open_now if self._failed[number] < PATIENCE]
        stream = max(useful or open_now, key=lambda number: (self._credit[number], -number))
        index, epoch = self.orders[stream].at(self.drawn[stream])
        self.drawn[stream] += 1
        return Draw(stream, index, epoch, progress, self.seed)

    def told(self, draw: Draw, tokens: int) -> None:
        """Count the tokens of a draw; 0 if it came to nothing."""
        if tokens:
            self._failed = [min(failed, PATIENCE - 1) for failed in self._failed]  # those that waited may try again
        self._failed[draw.stream] = 0 if tokens else self._failed[draw.stream] + 1
        self.tokens[draw.stream] += tokens
        for number, share in enumerate(self.shares(draw.progress)):
            self._credit[number] += share * tokens
        self._credit[draw.stream] -= tokens

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": list(self.drawn),
            "tokens": list(self.tokens),
            "credit": list(self._credit),
            "failed": list(self._failed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: It is of another number of streams.
        """
        found, expected = len(state["drawn"]), len(self.orders)
        if found != expected:
            raise ConfigError(f"the saved place is of {found} streams, the data has {expected}")
        self.drawn, self.tokens = list(state["drawn"]), list(state["tokens"])
        self._credit = list(state["credit"])
        self._failed = list(state.get("failed", [0] * expected))

    def _weights(self, progress: float) -> list[float]:
        return [float(np.interp(progress, places, values)) for places, values in self._shares]


def _points(share: Any, number: int) -> tuple[list[float], list[float]]:
    """Progress and value of every point of a share."""
    points = [(0.0, share)] if isinstance(share, int | float) else list(share)
    try:
        places, values = [float(place) for place, _ in points], [float(value) for _, value in points]
    except (TypeError, ValueError):
        raise ConfigError(
            f"share of stream {number}: expected a number or points (progress, number), found {share!r}"
        ) from None
    if not points or any(not 0 <= value < math.inf for value in values):
        raise ConfigError(f"share of stream {number}: expected numbers of at least 0, found {share!r}")
    if any(not 0 <= place <= 1 for place in places) or sorted(set(places)) != places:
        raise ConfigError(
            f"share of stream {number}: progress rises from point to point, within 0 and 1; found {share!r}"
        )
    return places, values
