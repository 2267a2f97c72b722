"""Conversations on disk, and which of them a step learns from.

    files --one pass--> where every line begins
    seed, epoch -> order of the samples; step s takes positions [s * batch, (s + 1) * batch) of that endless sequence
    rank k of N prepares a contiguous part of them -> micro-batches

Which samples a step takes depends on the seed and the position alone: not on ranks, threads, or what came before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlkit.errors import ConfigError, SampleError, SequenceTooLongError, UnsafePathError, VlkitError
from vlkit.hub.strict_json import parse_json
from vlkit.objectives import next_token_targets
from vlkit.objectives.cross_entropy import IGNORE
from vlkit.packing import Batch
from vlkit.processing import Processor
from vlkit.processing.chat import usual_parts

_FIELDS = ("messages", "images", "videos", "tools", "id")


@dataclass(frozen=True)
class LinesFile:
    """A file of JSON lines.

    Attributes:
        path: Where it is.
        starts: Offset of every line that holds something.
        lines: Number of each of these lines, from 1.
        size: Bytes.
        sha256: Of the whole file.
    """

    path: Path
    starts: np.ndarray
    lines: np.ndarray
    size: int
    sha256: str

    @classmethod
    def scan(cls, path: Path | str) -> LinesFile:
        """Find the lines of a file.

        Raises:
            ConfigError: It cannot be read, or holds nothing.
        """
        path = Path(path)
        digest, starts, lines = hashlib.sha256(), [], []
        offset = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    digest.update(line)
                    if line.strip():
                        starts.append(offset)
                        lines.append(number)
                    offset += len(line)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not starts:
            raise ConfigError(f"{path}: no lines; a file of conversations has one JSON object per line")
        return cls(path, np.array(starts), np.array(lines), offset, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            return file.readline()

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index]}"


class Conversations:
    """The samples of several files of JSON lines.

    A line is {"messages": [...]}, where parts hold their images and videos, or "images" and "videos" beside the messages
    do; "tools" are passed on; "id" is for people. Paths are relative to the file's folder and never leave it.

    Raises:
        ConfigError: A file that cannot be read or is empty.
    """

    def __init__(self, files: Sequence[Path | str]) -> None:
        self.files = [LinesFile.scan(path) for path in files]
        self._ends = np.cumsum([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells these files from others, wherever they lie."""
        return [
            {"name": file.path.name, "bytes": file.size, "samples": len(file), "sha256": file.sha256}
            for file in self.files
        ]

    def where(self, index: int) -> str:
        """File and line of a sample."""
        file, line = self._find(index)
        return file.where(line)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample as it is on disk, with the paths of its images made absolute.

        Raises:
            SampleError: Not JSON, another shape, or a path that leaves the folder; with file and line.
        """
        file, line = self._find(index)
        where = file.where(line)
        values = parse_json(file.read(line).strip(), where, error=SampleError)
        if unknown := sorted(set(values) - set(_FIELDS)):
            raise SampleError(f"{where}: unknown field {unknown[0]!r}; a sample has {', '.join(_FIELDS)}")
        messages = values.get("messages")
        if not (isinstance(messages, list) and messages and all(isinstance(each, dict) for each in messages)):
            raise SampleError(f"{where}: 'messages' must be a list of messages, found {json.dumps(messages)[:80]}")
        try:
            return _confined(values, file.path.parent.resolve())
        except VlkitError as error:
            raise SampleError(f"{where}: {error}") from error

    def _find(self, index: int) -> tuple[LinesFile, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[file], index - (int(self._ends[file - 1]) if file else 0)


def _confined(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sample with every path made absolute, or UnsafePathError."""

    def source(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {**value, "path": source(value["path"])} if isinstance(value.get("path"), str) else value
        if isinstance(value, list):  # the frames of a video
            return [source(each) for each in value]
        if not isinstance(value, str) or value[:5].lower() == "data:":
            return value
        if value[:8].lower().startswith(("http://", "https://")):
            return value  # refused, with a way out, where images are read
        if "\0" in value:
            raise UnsafePathError(f"{value!r} holds a zero byte, which no path has")
        path = Path(value.removeprefix("file://"))
        real = Path(os.path.realpath(folder / path))
        if not real.is_relative_to(folder):
            raise UnsafePathError(
                f"{value!r} lies outside of {folder}; images and videos are named relative to the file's folder"
            )
        if path.is_absolute():
            raise UnsafePathError(
                f"{value!r} is absolute; images and videos are named relative to the file's folder: write "
                f"{str(real.relative_to(folder))!r}"
            )
        return str(real)

    def part(value: Any) -> Any:
        if not isinstance(value, Mapping) or value.get("type") not in ("image", "video"):
            return value
        return {key: source(each) if key == value["type"] else each for key, each in value.items()}

    def message(value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("content"), list):
            return {**value, "content": [part(each) for each in value["content"]]}
        return value

    messages = [message(each) for each in usual_parts(values["messages"])]
    beside = {key: [source(each) for each in values[key]] for key in ("images", "videos") if values.get(key)}
    return {**values, **beside, "messages": messages}


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
