"""Which conversations a step learns from.

    seed, epoch -> order of the samples; step s takes positions [s * batch, (s + 1) * batch) of that endless sequence
    rank k of N prepares a contiguous part of them -> micro-batches

Which samples a step takes depends on the seed and the position alone: not on ranks, threads, or what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vlkit.errors import SampleError, SequenceTooLongError, VlkitError
from vlkit.objectives import next_token_targets
from vlkit.objectives.cross_entropy import IGNORE
from vlkit.packing import Batch
from vlkit.processing import Processor
from vlkit.training.sources import LinesFile as LinesFile
from vlkit.training.sources import SampleFiles as Conversations


def order(num_samples: int, positions: Iterable[int], *, seed: int, shuffle: bool = True) -> list[int]:
    """The samples at some positions of the endless sequence of epochs, each a new permutation."""
    epochs: dict[int, np.ndarray] = {}
    found = []
    for position in positions:
        epoch, place = divmod(position, num_samples)
        if shuffle:
            if epoch not in epochs:
                epochs[epoch] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)
            place = int(epochs[epoch][place])
        found.append(place)
    return found


class StepShare(NamedTuple):
    """What a rank learns from in one step.

    Attributes:
        micro_batches: One per forward; none where the rank has nothing.
        num_targets: Supervised tokens in all of them.
        num_tokens: Tokens in all of them.
        corrupt: Samples left out because they cannot be used.
    """

    micro_batches: tuple[Batch, ...]
    num_targets: int
    num_tokens: int
    corrupt: int


class StepReader:
    """Prepares a rank's part of every step, one step ahead in threads.

    Args:
        data: All samples.
        processor: Makes batches of them.
        batch: Samples of a step over all ranks.
        rank: Which part.
        num_ranks: Parts that a step is divided into.
        seed: Of the order.
        shuffle: Whether every epoch has another order.
        skip_corrupt: Leave out samples that cannot be used.
        max_tokens: Samples with more cannot be used.
        positions: Of the decoder: neither can samples with more tokens than these.
        max_samples: Of a micro-batch.
        max_batch_tokens: Of a micro-batch of more than one sample.
        workers: Threads; 0 prepares a step when it is asked for.
    """

    def __init__(
        self,
        data: Conversations,
        processor: Processor,
        *,
        batch: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        skip_corrupt: bool = False,
        max_tokens: int | None = None,
        positions: int | None = None,
        max_samples: int | None = None,
        max_batch_tokens: int | None = None,
        workers: int = 0,
    ) -> None:
        self.data, self.processor = data, processor
        self.batch, self.rank, self.num_ranks = batch, rank, num_ranks
        self.seed, self.shuffle, self.skip_corrupt = seed, shuffle, skip_corrupt
        self.max_tokens, self.positions = max_tokens, positions
        self.max_samples, self.max_batch_tokens = max_samples, max_batch_tokens
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="samples") if workers else None
        self._ahead: tuple[int, list[Future[Batch | None]]] | None = None

    def __enter__(self) -> StepReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def samples(self, position: int) -> list[int]:
        """The samples of this rank in the step that begins at a position."""
        first, last = (self.batch * (self.rank + i) // self.num_ranks for i in (0, 1))
        positions = range(position + first, position + last)
        return order(len(self.data), positions, seed=self.seed, shuffle=self.shuffle)

    def read(self, position: int) -> StepShare:
        """This rank's part of the step that begins at a position; the next step is begun meanwhile.

        Raises:
            SampleError: A sample that cannot be used, where those are not left out; with file and line.
        """
        if self._pool is None:
            return self._share([self._prepare(index) for index in self.samples(position)])
        at, futures = self._ahead or (None, [])
        if at != position:
            futures = self._begin(position)
        self._ahead = (position + self.batch, self._begin(position + self.batch))
        return self._share([future.result() for future in futures])

    def _begin(self, position: int) -> list[Future[Batch | None]]:
        assert self._pool is not None
        return [self._pool.submit(self._prepare, index) for index in self.samples(position)]

    def _prepare(self, index: int) -> Batch | None:
        """The sample as a batch of one, or None where it is left out."""
        try:
            sample = self.data[index]
            batch = self._one(sample)
        except VlkitError as error:
            if self.skip_corrupt:
                return None
            if isinstance(error, SampleError):
                raise
            raise SampleError(f"{self.data.where(index)}: {error}") from error
        return batch

    def _one(self, sample: dict[str, Any]) -> Batch:
        batch = self.processor(
            sample["messages"], sample.get("images"), sample.get("videos"), tools=sample.get("tools"), labels=True
        )
        num_tokens = batch.ids.layout.num_tokens
        limits = (
            (self.max_tokens, f"data.max_tokens = {self.max_tokens}"),
            (self.positions, f"the {self.positions} positions of the decoder"),
        )
        for limit, name in limits:
            if limit is not None and num_tokens > limit:
                raise SequenceTooLongError(
                    f"{num_tokens} tokens, more than {name}; cut the sample, or leave such samples out with "
                    "data.corrupt = 'skip'"
                )
        return batch

    def _share(self, prepared: Sequence[Batch | None]) -> StepShare:
        kept = [batch for batch in prepared if batch is not None]
        groups = micro_batches([b.ids.layout.num_tokens for b in kept], self.max_samples, self.max_batch_tokens)
        return StepShare(
            tuple(Batch.concat(kept[start:end]) for start, end in groups),
            sum(num_targets(batch) for batch in kept),
            sum(batch.ids.layout.num_tokens for batch in kept),
            len(prepared) - len(kept),
        )


def micro_batches(lengths: Sequence[int], max_samples: int | None, max_tokens: int | None) -> list[tuple[int, int]]:
    """Neighbours together while they fit: (start, end) of each micro-batch. A sample that is too long alone goes alone."""
    groups: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        full = max_samples is not None and index - start >= max_samples
        if index > start and (full or (max_tokens is not None and tokens + length > max_tokens)):
            groups.append((start, index))
            start, tokens = index, 0
        tokens += length
    return [*groups, (start, len(lengths))] if lengths else groups


def num_targets(batch: Batch) -> int:
    """Tokens of a batch that are predicted: those with a label, but for the first of every sequence."""
    assert batch.labels is not None
    return int((next_token_targets(batch.labels, batch.ids.layout) != IGNORE).sum())
