"""Which prompts a policy is asked: from easy to hard, or those that it fails at.

    difficulties --CurriculumDraws--> the least drawn of the easiest so far, which grow to all
    SuccessRates --PrioritisedDraws--> in proportion to 1 - the share of right answers

Both are `vlkit.training.order.Draws`: what comes next depends on the seed and the state alone.

Source: Kimi k1.5, arXiv:2501.12599, section 2.3.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vlkit.errors import ConfigError, SampleError
from vlkit.training.order import Draw


class _Sized(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


def difficulties(source: _Sized) -> list[float]:
    """The "difficulty" of every sample of a source. One that cannot be read or has none counts as the hardest."""
    found = []
    for index in range(len(source)):
        try:
            value = source[index].get("difficulty")
        except SampleError:
            value = None
        found.append(math.inf if value is None else float(value))
    return found


class SuccessRates:
    """How often every sample was answered, and how often rightly; equal on all ranks.

    Attributes:
        changes: Rises whenever a rate may have changed.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self.changes = 0

    def count(self, key: str, right: bool) -> None:
        """Take one answer in."""
        self.changes += 1
        tries = self._counts.setdefault(key, [0, 0])
        tries[0] += 1
        tries[1] += bool(right)

    def rate(self, key: str) -> float:
        """The share of right answers; 0 for a sample that was never answered."""
        tries, right = self._counts.get(key, (0, 0))
        return right / tries if tries else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"counts": {key: list(counts) for key, counts in self._counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.changes += 1
        self._counts = {key: [int(each) for each in counts] for key, counts in state["counts"].items()}


class CurriculumDraws:
    """From easy to hard: a part of the samples is open, the easiest, and of these the one drawn least often comes next.

    Args:
        levels: Difficulty of every sample of every stream; higher is harder. Equals come in an order of the seed.
        start: Share of the samples that is open at the beginning.
        until: Progress of the stage at which all are; in between the share grows in a straight line.
        seed: Of the order of equals.

    Raises:
        ConfigError: No samples, a difficulty that is NaN, or shares outside of 0 and 1.
    """

    needs_tokens = False
    needs_outcome = False

    def __init__(
        self, levels: Sequence[Sequence[float]], *, start: float = 0.2, until: float = 0.8, seed: int = 0
    ) -> None:
        self._keys = _keys([len(each) for each in levels])
        flat = np.array([level for each in levels for level in each], dtype=np.float64)
        if np.isnan(flat).any():
            raise ConfigError("a difficulty is NaN; give every sample a number, or none for the hardest")
        for name, value in (("start", start), ("until", until)):
            if not 0 <= value <= 1:
                raise ConfigError(f"a curriculum's {name} lies between 0 and 1, found {value}")
        self.seed, self.start, self.until = seed, start, until
        ties = np.random.Generator(np.random.PCG64([seed, len(flat)])).permutation(len(flat))
        self._order = ties[np.argsort(flat[ties], kind="stable")]  # samples from easy to hard
        self._drawn = np.zeros(len(flat), dtype=np.int64)  # in that order

    def open(self, progress: float) -> int:
        """How many of the easiest samples are open."""
        grown = 1.0 if progress >= self.until else progress / self.until
        share = self.start + (1 - self.start) * grown
        return min(len(self._order), max(1, math.ceil(share * len(self._order) - 1e-9)))

    def next(self, progress: float) -> Draw:
        place = int(np.argmin(self._drawn[: self.open(progress)]))  # of equals the easiest
        epoch = int(self._drawn[place])
        self._drawn[place] += 1
        stream, index = self._keys[self._order[place]]
        return Draw(stream, index, epoch, progress, self.seed)

    def told(self, draw: Draw, tokens: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = _counts(state, len(self._order))


class PrioritisedDraws:
    """In proportion to 1 - success rate, with replacement; where all are always right, all alike.

    Args:
        sizes: Samples of every stream.
        rates: Of the task that judges the answers, by "stream/index". It is saved with the task, not here.
        seed: Of the draws.

    Raises:
        ConfigError: No samples.
    """

    needs_tokens = False
    needs_outcome = True

    def __init__(self, sizes: Sequence[int], rates: SuccessRates, *, seed: int = 0) -> None:
        self._keys = _keys(sizes)
        self.rates, self.seed = rates, seed
        self._known: tuple[int, np.ndarray] | None = None
        self._drawn = np.zeros(len(self._keys), dtype=np.int64)

    def next(self, progress: float) -> Draw:
        ends = self._ends()
        words = np.random.SeedSequence(self.seed, spawn_key=(int(self._drawn.sum()),))
        at = np.random.Generator(np.random.PCG64(words)).random() * ends[-1]
        place = int(np.searchsorted(ends, at, side="right"))
        epoch = int(self._drawn[place])
        self._drawn[place] += 1
        stream, index = self._keys[place]
        return Draw(stream, index, epoch, progress, self.seed)

    def _ends(self) -> np.ndarray:
        """Where the part of every sample ends on a line; made anew when a rate has changed."""
        if self._known is None or self._known[0] != self.rates.changes:
            weights = np.array([1 - self.rates.rate(f"{stream}/{index}") for stream, index in self._keys])
            self._known = self.rates.changes, np.cumsum(weights if weights.any() else np.ones(len(weights)))
        return self._known[1]

    def told(self, draw: Draw, tokens: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = _counts(state, len(self._keys))


def _keys(sizes: Sequence[int]) -> list[tuple[int, int]]:
    keys = [(stream, index) for stream, size in enumerate(sizes) for index in range(size)]
    if not keys:
        raise ConfigError("there are no samples to draw from")
    return keys


def _counts(state: Mapping[str, Any], size: int) -> np.ndarray:
    """Saved counts of draws.

    Raises:
        ConfigError: They are of another number of samples.
    """
    found = state.get("drawn", ())
    if len(found) != size:
        raise ConfigError(f"the saved place is of {len(found)} samples, the data has {size}")
    return np.array(found, dtype=np.int64)
