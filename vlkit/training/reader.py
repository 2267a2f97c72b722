"""Reader: what every step learns from, prepared in threads and divided over ranks.

    draws --plan (the same on every rank)--> N samples, or N packs of them, for a step
          --rank k of R prepares the k-th part of it--> items --pack by budget--> StepShare

A step depends on the draws alone. Ranks divide it, threads prepare it earlier, and neither changes what is in it. The state
is the place after the last step that was returned; what was begun meanwhile is begun again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from vlkit.errors import ConfigError, SampleError, SequenceTooLongError, VlkitError
from vlkit.training.order import Draw, Draws
from vlkit.training.packs import Cost, Fill, Sized, StreamingPacker, pack_items
from vlkit.training.sources import Source

ItemT = TypeVar("ItemT", bound=Sized)


class StepShare(NamedTuple, Generic[ItemT]):
    """What a rank learns from in one step.

    Attributes:
        packs: Items of every forward; none where the rank has nothing.
        samples: Drawn for it, those left out included; over all ranks they add up to what the step drew.
        corrupt: Samples left out because they cannot be used.
        fill: Of its packs.
        plan: A number made of all that the step drew, on all ranks: where it differs, ranks do not see the same samples.
    """

    packs: tuple[tuple[ItemT, ...], ...]
    samples: int
    corrupt: int
    fill: Fill
    plan: int

    @property
    def items(self) -> list[ItemT]:
        return [item for items in self.packs for item in items]


class Planned(NamedTuple):
    """A draw, and what it was measured to cost; None where it was not measured."""

    draw: Draw
    cost: Cost | None = None

    def as_json(self) -> list[Any]:
        return [*self.draw.as_json(), *(self.cost or ())]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Planned:
        return cls(Draw(*values[:5]), (values[5], values[6]) if len(values) > 5 else None)


@dataclass(frozen=True)
class _Begun(Generic[ItemT]):
    """A step on its way: this rank's units (samples, or packs of them), and the state after it."""

    progress: float
    units: list[list[Callable[[], ItemT | None]]]
    dropped: int
    plan: int
    state: dict[str, Any]


class Reader(Generic[ItemT]):
    """Draws, prepares and divides the samples of every step.

    Either `batch` or `packs` says what a step is. With `batch` every rank has a contiguous part of the samples, packed by
    `micro_*`. With `packs` samples are measured as they are drawn and put into packs, the same on every rank; each prepares
    only its contiguous part of the packs, and a pack is a forward.

    Args:
        sources: Of every stream.
        draws: What is drawn next.
        prepare: Makes an item of a sample; runs in threads and depends on its arguments alone.
        measure: Tokens and patches of what `prepare` makes, or more, but cheaply. None measures by `prepare`. It is asked where
            packs or draws need it: then on every rank, for every sample.
        batch: Samples of a step over all ranks.
        packs: Packs of a step over all ranks; with `pack_tokens`.
        pack_tokens: Of a pack of more than one sample.
        pack_patches: The same; None for any number.
        open_rows: Packs that are filled at the same time.
        micro_samples: Most samples of a forward, with `batch`.
        micro_tokens: Of a forward of more than one sample, with `batch`.
        micro_patches: The same.
        skip_corrupt: Leave out samples that cannot be used.
        skip_long: Leave out those that are too long: preparing or measuring them raises SequenceTooLongError.
        rank: Which part.
        num_ranks: Parts that a step is divided into.
        workers: Threads; 0 prepares a step when it is asked for.

    Raises:
        ConfigError: Not exactly one of batch and packs, or packs without a budget.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        draws: Draws,
        prepare: Callable[[dict[str, Any], Draw], ItemT],
        *,
        measure: Callable[[dict[str, Any], Draw], Cost] | None = None,
        batch: int | None = None,
        packs: int | None = None,
        pack_tokens: int | None = None,
        pack_patches: int | None = None,
        open_rows: int = 32,
        micro_samples: int | None = None,
        micro_tokens: int | None = None,
        micro_patches: int | None = None,
        skip_corrupt: bool = False,
        skip_long: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
        workers: int = 0,
    ) -> None:
        if (batch is None) == (packs is None):
            raise ConfigError("a step is either batch samples or packs packs: give one of the two")
        if (packs is None) != (pack_tokens is None):
            raise ConfigError("steps of packs need pack_tokens, and only they do")
        self.sources, self.draws = sources, draws
        self._make, self._measure = prepare, measure
        self._units = batch or packs or 1
        self._packer: StreamingPacker[list[Any]] | None = None
        if pack_tokens is not None:
            self._packer = StreamingPacker(pack_tokens, pack_patches, open_rows=open_rows)
        self._micro = {"tokens": micro_tokens, "patches": micro_patches, "most": micro_samples}
        self.skip_corrupt, self.skip_long = skip_corrupt, skip_long
        self.rank, self.num_ranks = rank, num_ranks
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="samples") if workers else None
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="steps") if workers else None
        self._ahead: Future[_Begun[ItemT]] | None = None
        self.left_out: str | None = None  # for messages: a sample that was left out, with the reason
        self._state = self._place()

    def __enter__(self) -> Reader[ItemT]:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._planner, self._pool):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def read(self, progress: float, upcoming: float | None = None) -> StepShare[ItemT]:
        """This rank's part of the next step.

        Args:
            progress: Of the stage, from 0 to 1.
            upcoming: Progress at the next call, whose step is begun meanwhile, where there are threads and draws allow it.
                A call with another progress is answered rightly too, but later.

        Raises:
            SampleError: A sample that cannot be used, where those are not left out; with file and line.
        """
        if self.draws.needs_outcome:
            self._state = self._place()  # what the last step came to was told after it was returned
        try:
            begun = self._take_ahead(progress) or self._begin(progress)
            if self._planner is not None and upcoming is not None and not self.draws.needs_outcome:
                self._ahead = self._planner.submit(self._begin, upcoming)
            share = self._share(begun)
        except BaseException:
            self._return_to(self._state)
            raise
        self._state = begun.state
        return share

    def state_dict(self) -> dict[str, Any]:
        """The place after the last step that was returned, as JSON. It does not depend on ranks or threads."""
        return self._place() if self.draws.needs_outcome else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place.

        Raises:
            ConfigError: It is the place of other streams, or of steps made in another way.
        """
        if ("packer" in state) != (self._packer is not None):
            before, now = ("packs", "samples") if "packer" in state else ("samples", "packs")
            raise ConfigError(f"the saved place is of steps of {before}, these are steps of {now}")
        self._return_to(json.loads(json.dumps(state)))

    # Steps

    def _take_ahead(self, progress: float) -> _Begun[ItemT] | None:
        """The step that was begun meanwhile, if it is the one."""
        if self._ahead is None:
            return None
        begun = self._ahead.result()
        self._ahead = None
        if begun.progress == progress:
            return begun
        self._return_to(self._state)
        return None

    def _begin(self, progress: float) -> _Begun[ItemT]:
        """Plan a step for all ranks, and begin to prepare this rank's part."""
        plan: list[list[Planned]] = []
        dropped = 0
        for _ in range(self._units):
            unit, left_out = self._unit(progress)
            plan.append(unit)
            dropped += left_out
        first, last = (self._units * (self.rank + i) // self.num_ranks for i in (0, 1))
        own = [[self._started(planned) for planned in unit] for unit in plan[first:last]]
        number = zlib.crc32(json.dumps([[planned.as_json() for planned in unit] for unit in plan]).encode())
        return _Begun(progress, own, dropped, number, self._place())

    def _unit(self, progress: float) -> tuple[list[Planned], int]:
        """One sample, or one pack of them, and how many were left out on the way."""
        if self._packer is None:
            return [self._drawn(progress)], 0
        most = 2 * sum(len(source) for source in self.sources)  # no more in a row, if one of an epoch can be used
        dropped = in_a_row = 0
        while in_a_row < most:
            planned = self._drawn(progress)
            if planned.cost is None:
                dropped, in_a_row = dropped + 1, in_a_row + 1
                continue
            in_a_row = 0
            for row in self._packer.add(planned.as_json(), *planned.cost):
                return [Planned.from_json(values) for values in row], dropped
        raise SampleError(f"{in_a_row} samples in a row cannot be used; {self.left_out}")

    def _drawn(self, progress: float) -> Planned:
        """The next draw, measured where that is needed."""
        draw = self.draws.next(progress)
        cost = None
        if self._packer is not None or self.draws.needs_tokens:
            cost = self._usable(draw, self._measured)
        if self.draws.needs_tokens:
            self.draws.told(draw, cost[0] if cost else 0)
        return Planned(draw, cost)

    def _started(self, planned: Planned) -> Callable[[], ItemT | None]:
        work = partial(self._prepared, planned)
        return work if self._pool is None else self._pool.submit(work).result

    def _share(self, begun: _Begun[ItemT]) -> StepShare[ItemT]:
        """Wait for this rank's part of a step."""
        found = [[make() for make in unit] for unit in begun.units]
        kept = [[item for item in unit if item is not None] for unit in found]
        samples, left_out = sum(map(len, found)), sum(map(len, found)) - sum(map(len, kept))
        if self._packer is None:
            packs = pack_items([item for unit in kept for item in unit], **self._micro)
            budget = {"tokens": self._micro["tokens"], "patches": self._micro["patches"]}
        else:
            packs = [unit for unit in kept if unit]
            budget = {"tokens": self._packer.tokens, "patches": self._packer.patches}
        dropped = begun.dropped if self.rank == 0 else 0  # every rank left these out: they count once
        fill = Fill.of([[(item.num_tokens, item.num_patches) for item in items] for items in packs], **budget)
        return StepShare(
            tuple(tuple(items) for items in packs), samples + dropped, left_out + dropped, fill, begun.plan
        )

    # Samples

    def _prepared(self, planned: Planned) -> ItemT | None:
        return self._usable(planned.draw, partial(self._made, cost=planned.cost))

    def _usable(self, draw: Draw, make: Callable[[dict[str, Any], Draw], Any]) -> Any:
        """What `make` makes of a draw, or None where the sample is left out."""
        source, named = self.sources[draw.stream], True
        try:
            sample = source[draw.index]
            named = False  # a source names file and line, what comes now does not know them
            return make(sample, Draw(*draw.as_json()))
        except VlkitError as error:
            reason = str(error) if named and isinstance(error, SampleError) else f"{source.where(draw.index)}: {error}"
            if self.skip_corrupt or (self.skip_long and isinstance(error, SequenceTooLongError)):
                self.left_out = f"one of them is {reason}"
                return None
            raise SampleError(reason) from error

    def _measured(self, sample: dict[str, Any], draw: Draw) -> Cost:
        if self._measure is None:
            item = self._make(sample, draw)
            return item.num_tokens, item.num_patches
        tokens, patches = self._measure(sample, draw)
        return int(tokens), int(patches)

    def _made(self, sample: dict[str, Any], draw: Draw, cost: Cost | None) -> ItemT:
        item = self._make(sample, draw)
        if cost is not None and (item.num_tokens > cost[0] or item.num_patches > cost[1]):
            raise SampleError(
                f"measured as {cost[0]} tokens and {cost[1]} patches, but it has {item.num_tokens} and {item.num_patches}; a "
                "file has changed, or `measure` does not belong to `prepare`"
            )
        return item

    # Place

    def _place(self) -> dict[str, Any]:
        place: dict[str, Any] = {"draws": self.draws.state_dict()}
        if self._packer is not None:
            place["packer"] = self._packer.state_dict()
        return place

    def _return_to(self, state: dict[str, Any]) -> None:
        """Forget what was begun, and stand at a place."""
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.exception()
        self._ahead = None
        self.draws.load_state_dict(state["draws"])
        if self._packer is not None:
            self._packer.load_state_dict(state["packer"])
        self._state = state
