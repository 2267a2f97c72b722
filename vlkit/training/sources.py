"""Samples on disk, by their number: files of JSON lines, and shards of WebDataset.

    paths --open_source, one pass--> SampleFiles: where every sample begins --[index]--> a checked sample

Opening looks at the shape of the files alone. A sample is read and checked when it is asked for, so that one that is broken
can be left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlkit.errors import ConfigError, SampleError
from vlkit.hub.strict_json import parse_json
from vlkit.training.samples import check_sample, confined, with_sources
from vlkit.training.shards import ShardFile


class Source(Protocol):
    """Samples that can be read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A sample, checked; images and videos are absolute paths or bytes.

        Raises:
            SampleError: It cannot be used; with file and line.
        """

    def where(self, index: int) -> str:
        """What errors call a sample."""

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells these files from others, wherever they lie; JSON."""


class SampleFile(Protocol):
    """One file of a source; as `Source`, but its fingerprint is one entry."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str: ...

    def fingerprint(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LinesFile:
    """A file of JSON lines, a sample in each.

    Paths are relative to the file's folder and never leave it.

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
            raise ConfigError(f"{path}: no lines; a file of samples has one JSON object per line")
        return cls(path, np.array(starts), np.array(lines), offset, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        values = parse_json(self.read(index).strip(), where, error=SampleError)
        check_sample(values, where)
        return with_sources(values, confined(self.path.parent.resolve()), where)

    def read(self, index: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            return file.readline()

    def where(self, index: int) -> str:
        return f"{self.path}, line {self.lines[index]}"

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.path.name, "bytes": self.size, "samples": len(self), "sha256": self.sha256}


class SampleFiles:
    """The samples of several files, one after another.

    Raises:
        ConfigError: A file that cannot be read, is empty, or is no file of samples.
        UnsafePathError: A shard holds a link, or a name that leaves it.
    """

    def __init__(self, paths: Sequence[Path | str]) -> None:
        if not paths:
            raise ConfigError("no files of samples")
        self.files: list[SampleFile] = [_opened(Path(path)) for path in paths]
        self._ends = np.cumsum([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, with the paths of its images made absolute, or their bytes.

        Raises:
            SampleError: Not JSON, another shape, or a path that leaves the folder; with file and line.
        """
        file, place = self._find(index)
        return file[place]

    def where(self, index: int) -> str:
        """File and line of a sample."""
        file, place = self._find(index)
        return file.where(place)

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells these files from others, wherever they lie."""
        return [file.fingerprint() for file in self.files]

    def _find(self, index: int) -> tuple[SampleFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[file], index - (int(self._ends[file - 1]) if file else 0)


def open_source(paths: Path | str | Sequence[Path | str]) -> SampleFiles:
    """The samples of a file or of several: ".tar" are shards of WebDataset, all others JSON lines.

    Raises:
        ConfigError: A file that cannot be read, is empty, or is no file of samples.
        UnsafePathError: A shard holds a link, or a name that leaves it.
    """
    return SampleFiles([paths] if isinstance(paths, str | os.PathLike) else paths)


def _opened(path: Path) -> SampleFile:
    name = path.name.lower()
    if name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")):
        raise ConfigError(f"{path}: samples are read in any order, which compression prevents; unpack it")
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait for ever
        raise ConfigError(f"{path}: a pipe or a device; samples are read in any order, so write them to a file")
    return ShardFile.scan(path) if name.endswith(".tar") else LinesFile.scan(path)
