"""Shards of WebDataset: tar files in which members that share a name up to its first dot are one sample.

    00017.json 00017.jpg 00018.json 00018.0.png 00018.1.png ...
    --one pass over the headers--> where every member's bytes are --[index]--> a sample with its images as bytes

".json" is the sample itself. Its images and videos are members: parts and "images" name them by what follows the first dot
("jpg", "0.png"), parts without a name take them in order. Without messages, ".txt" beside one image is its caption, and a
".json" beside both is for people. Nothing is ever written to disk, and no name inside a shard is a path outside of it.

Source: https://github.com/webdataset/webdataset, the format as its readme describes it.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.errors import ConfigError, SampleError, UnsafePathError, VlkitError
from vlkit.hub.strict_json import parse_json
from vlkit.processing.chat import usual_parts
from vlkit.training.samples import check_sample, messages_of, with_sources

IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
VIDEOS = ("mp4", "mov", "webm", "mkv", "avi")
_BLOCK = 512  # bytes of a tar header; the archive ends with a block of zeros


class Member(NamedTuple):
    """A file in a shard.

    Attributes:
        kind: What follows the first dot of its name, such as "jpg" or "0.png".
        offset: Where its bytes begin.
        size: How many there are.
    """

    kind: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        return self.kind.rsplit(".", 1)[-1].lower()


@dataclass(frozen=True)
class ShardFile:
    """A shard.

    Attributes:
        path: Where it is.
        keys: What the names of each sample's members begin with.
        members: The members of each sample, in the order of the file.
        size: Bytes.
        sha256: Of all names, places and sizes. The contents are not read, since shards are large.
    """

    path: Path
    keys: tuple[str, ...]
    members: tuple[tuple[Member, ...], ...]
    size: int
    sha256: str

    @classmethod
    def scan(cls, path: Path | str) -> ShardFile:
        """Find the members of a shard.

        Raises:
            ConfigError: It cannot be read, is no tar, is truncated or damaged, or holds no samples; with the member.
            UnsafePathError: A member is a link, a device, or has a name that leaves the shard.
        """
        path = Path(path)
        groups: dict[str, list[Member]] = {}
        digest = hashlib.sha256()
        name = ""
        try:
            size = path.stat().st_size
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    name = member.name
                    archive.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
                    if member.isdir():
                        continue
                    key, found = _member(member, f"{path}: member {name!r}")
                    if found.kind in (each.kind for each in groups.get(key, ())):
                        raise ConfigError(f"{path}: member {name!r} is there twice")
                    groups.setdefault(key, []).append(found)
                    digest.update(f"{name}\0{found.offset}\0{found.size}\n".encode(errors="surrogateescape"))
                file.seek(archive.offset)
                end = file.read(_BLOCK)
        except VlkitError:  # some of them are OSError too
            raise
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            after = f" after member {name!r}" if name else ""
            raise ConfigError(f"{path}: not a tar file, truncated or damaged{after}: {error}") from error
        if end != bytes(_BLOCK):
            raise ConfigError(
                f"{path}: truncated or damaged after member {name!r}: neither another member nor the end follows"
            )
        if not groups:
            raise ConfigError(f"{path}: no members; a shard has a .json, or a .txt and an image, per sample")
        return cls(path, tuple(groups), tuple(map(tuple, groups.values())), size, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where, members = self.where(index), self.members[index]
        contents: dict[str, bytes] = {}
        try:
            with self.path.open("rb") as file:
                for member in members:
                    file.seek(member.offset)
                    contents[member.kind] = file.read(member.size)
                    if len(contents[member.kind]) != member.size:
                        raise SampleError(f"{where}: the file ends inside of member '.{member.kind}'")
        except OSError as error:
            raise SampleError(f"{where}: cannot be read: {error.strerror or error}") from error
        return _sample(members, contents, where)

    def where(self, index: int) -> str:
        return f"{self.path}, sample {self.keys[index]!r}"

    def fingerprint(self) -> dict[str, Any]:
        return {"name": self.path.name, "bytes": self.size, "samples": len(self), "sha256": self.sha256}


def _member(member: tarfile.TarInfo, where: str) -> tuple[str, Member]:
    """Key and place of a member."""
    if not member.isreg() or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "no plain file"
        raise UnsafePathError(f"{where} is {kind}; a shard holds plain files")
    name = member.name.removeprefix("./")
    folder, slash, last = name.rpartition("/")
    if name.startswith("/") or ".." in folder.split("/"):
        raise UnsafePathError(f"{where}: the name leaves the shard")
    stem, _, kind = last.partition(".")
    if not stem or not kind:
        raise ConfigError(f"{where}: a name is a key, a dot and what it holds, such as '00017.json'")
    return folder + slash + stem, Member(kind, member.offset_data, member.size)


def _sample(members: Sequence[Member], contents: Mapping[str, bytes], where: str) -> dict[str, Any]:
    visual = {"images": IMAGES, "videos": VIDEOS}
    kinds = {name: [each.kind for each in members if each.suffix in suffixes] for name, suffixes in visual.items()}
    other = [
        each.kind for each in members if each.suffix not in (*IMAGES, *VIDEOS) and each.kind not in ("json", "txt")
    ]
    if other:
        raise SampleError(
            f"{where}: nothing is known of '.{other[0]}'; a sample has .json, .txt, images ({', '.join(IMAGES)}) and "
            f"videos ({', '.join(VIDEOS)})"
        )
    values: dict[str, Any] = {}
    if "json" in contents:
        values = parse_json(contents["json"], f"{where}, '.json'", error=SampleError)
    if "messages" not in values and "txt" in contents:
        return _caption(kinds, contents, where)
    if "txt" in contents:
        raise SampleError(f"{where}: has both messages and a '.txt'; a caption has no messages")
    check_sample(values, where)
    used: set[str] = set()

    def found(value: Any) -> Any:
        if not isinstance(value, str) or value[:5].lower() == "data:":
            return value
        if value not in contents:
            held = ", ".join(map(repr, [*kinds["images"], *kinds["videos"]])) or "none"
            raise SampleError(f"{value!r} is no member of the sample; its images and videos are {held}")
        used.add(value)
        return contents[value]

    sample = with_sources(values, found, where)
    if "image" in values or "text" in values:
        return sample
    for name, part in (("images", "image"), ("videos", "video")):
        rest = [kind for kind in kinds[name] if kind not in used]
        empty = _empty_parts(sample, part)
        if not sample.get(name) and empty == len(rest) and rest:
            sample[name] = [contents[kind] for kind in rest]
        elif rest:
            raise SampleError(
                f"{where}: no part shows '.{rest[0]}'; {empty} parts without an {part} for {len(rest)} members without a part"
            )
    return sample


def _empty_parts(sample: Mapping[str, Any], kind: str) -> int:
    return sum(
        isinstance(part, Mapping) and part.get("type") == kind and part.get(kind) is None
        for message in usual_parts(messages_of(sample))
        if isinstance(message.get("content"), list)
        for part in message["content"]
    )


def _caption(kinds: Mapping[str, Sequence[str]], contents: Mapping[str, bytes], where: str) -> dict[str, Any]:
    if len(kinds["images"]) != 1 or kinds["videos"]:
        raise SampleError(
            f"{where}: a '.txt' is the caption of one image, found {len(kinds['images'])} images and "
            f"{len(kinds['videos'])} videos; without a '.txt', '.json' holds the messages"
        )
    try:
        text = contents["txt"].decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"{where}: '.txt' is not UTF-8: {error}") from error
    sample = {"image": contents[kinds["images"][0]], "text": text.strip()}
    check_sample(sample, where)
    return sample
