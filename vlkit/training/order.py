"""Which sample comes at which place of an endless sequence of epochs, and what was drawn.

    seed, epoch -> a permutation of the samples; position p of the sequence is place p % samples of epoch p // samples

It depends on the seed and the position alone: not on ranks, threads, or what came before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Draw:
    """A sample that is to be learnt from.

    Attributes:
        stream: Number of the source.
        index: Number of the sample in it.
        epoch: How often the stream has been through all its samples.
        progress: Of the stage, from 0 to 1, when it was drawn.
        seed: Of the run.
    """

    stream: int
    index: int
    epoch: int = 0
    progress: float = 0.0
    seed: int = 0

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this sample in this epoch: the same in every thread, on every rank, in every resumed run."""
        words = np.random.SeedSequence(self.seed, spawn_key=(self.stream, self.index, self.epoch))
        return np.random.Generator(np.random.PCG64(words))

    def as_json(self) -> list[Any]:
        """The fields in order: `Draw(*draw.as_json())` is the draw, with its random numbers from the beginning."""
        return [self.stream, self.index, self.epoch, self.progress, self.seed]


class Draws(Protocol):
    """What is drawn next. All ranks hold equal ones and tell them the same.

    Attributes:
        needs_tokens: `told` has to be called after every `next`, because the next draw depends on it.
        needs_outcome: Draws depend on what the steps before came to: none is made before the last step has ended.
    """

    @property
    def needs_tokens(self) -> bool: ...

    @property
    def needs_outcome(self) -> bool: ...

    def next(self, progress: float) -> Draw:
        """The next sample, at a progress of the stage from 0 to 1."""

    def told(self, draw: Draw, tokens: int) -> None:
        """How many tokens the draw has; 0 if it cannot be used."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Order:
    """The endless sequence of the epochs of one stream, each a new permutation.

    Args:
        num_samples: Of the stream; at least one.
        seed: Of the permutations.
        stream: Number of the stream: others have other permutations.
        shuffle: False gives the samples as they lie, again and again.
    """

    def __init__(self, num_samples: int, *, seed: int, stream: int = 0, shuffle: bool = True) -> None:
        self.num_samples, self.seed, self.stream, self.shuffle = num_samples, seed, stream, shuffle
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def at(self, position: int) -> tuple[int, int]:
        """The sample at a position, and its epoch."""
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return place, epoch
        if epoch != self._epoch:
            words = [self.seed, epoch, self.stream] if self.stream else [self.seed, epoch]
            self._permutation = np.random.Generator(np.random.PCG64(words)).permutation(self.num_samples)
            self._epoch = epoch
        return int(self._permutation[place]), epoch


def order(num_samples: int, positions: Iterable[int], *, seed: int, shuffle: bool = True) -> list[int]:
    """The samples at some positions of the endless sequence of the first stream."""
    sequence = Order(num_samples, seed=seed, shuffle=shuffle)
    return [sequence.at(position)[0] for position in positions]


def stage_seed(seed: int, stage: int) -> int:
    """A seed for what a stage draws: the run's own in the first, and others that share no order with it."""
    return int(np.random.SeedSequence(seed, spawn_key=(stage,)).generate_state(1)[0]) if stage else seed
