"""Shards of WebDataset: members become samples, whatever is unsafe or damaged is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.training.samples import write_samples
from vlkit.errors import ConfigError, SampleError, UnsafePathError
from vlkit.models.factory import create_processor
from vlkit.training.sources import open_source


def png(width: int = 40, height: int = 30) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(file, "PNG")
    return file.getvalue()


def asked(*parts: Any) -> bytes:
    content = [{"type": "image", "image": part} if part else {"type": "image"} for part in parts]
    answer = {"role": "assistant", "content": "yes"}
    return json.dumps({"messages": [{"role": "user", "content": content}, answer]}).encode()


def write_shard(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return path


def test_members_of_one_name_are_one_sample(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("sub")
    folder.type = tarfile.DIRTYPE
    path = write_shard(
        tmp_path / "a.tar",
        *(("./0.json", asked("1.png", "0.png")), ("0.0.png", png(28)), ("0.1.png", png(56))),
        *(folder, ("sub/0.jpg", png()), ("sub/0.json", asked(None))),
        *(("c.jpg", png()), ("c.txt", "a café\n".encode()), ("c.json", b'{"url": "x"}')),
        ("d." + "long" * 60 + ".json", b"{}"),
    )
    data = open_source([path, path])
    assert len(data) == 8
    first, second, caption = data[0], data[5], data[2]
    assert [part["image"] for part in first["messages"][0]["content"]] == [png(56), png(28)]
    assert "images" not in first
    assert second["images"] == [png()]
    assert caption == {"image": png(), "text": "a café"}
    assert data.where(5) == f"{path}, sample 'sub/0'"
    batch = create_processor("kimi-vl-tiny")(first["messages"], first.get("images"), labels=True)
    assert batch.patches is not None
    assert batch.patches.layout.num_items == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("a.json", b"{"),), "not JSON"),
        ((("a.json", b'{"messages": []}'),), "must be a list of messages"),
        ((("a.json", asked("jpg")), ("a.png", png())), "'jpg' is no member of the sample; .* are 'png'"),
        ((("a.json", asked("/etc/passwd")), ("a.png", png())), "'/etc/passwd' is no member"),
        ((("a.json", asked({"path": "/etc/passwd"})), ("a.png", png())), "'/etc/passwd' is no member"),
        ((("a.json", asked(None)), ("a.0.png", png()), ("a.1.png", png())), "1 parts without an image for 2 members"),
        ((("a.json", asked(None)), ("a.cls", b"3")), r"nothing is known of '\.cls'"),
        ((("a.json", asked(None)), ("a.txt", b"3")), "both messages and a '.txt'"),
        ((("a.txt", b"3"),), "caption of one image, found 0 images"),
        ((("a.txt", b"\xff"), ("a.png", png())), "not UTF-8"),
        ((("a.png", png()),), "'messages' must be a list of messages"),
    ],
)
def test_a_broken_member_is_a_broken_sample_and_no_more(tmp_path: Path, members: Any, message: str) -> None:
    data = open_source(write_shard(tmp_path / "x.tar", *members, ("b.json", asked())))
    with pytest.raises(SampleError, match=rf"x\.tar, sample 'a'.*{message}"):
        data[0]
    assert len(data[1]["messages"]) == 2


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("member", "error", "message"),
    [
        (("/a.json", b""), UnsafePathError, "member '/a.json': the name leaves"),
        (("b/../../a.json", b""), UnsafePathError, "the name leaves"),
        (link("a.png"), UnsafePathError, "member 'a.png' is a link"),
        (("README", b""), ConfigError, "member 'README': a name is a key, a dot"),
        (("b/.json", b""), ConfigError, "a name is a key, a dot"),
        (("0.json", b""), ConfigError, "member '0.json' is there twice"),
    ],
)
def test_a_shard_that_is_unsafe_or_no_shard_is_refused(tmp_path: Path, member: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=rf"x\.tar: .*{message}"):
        open_source(write_shard(tmp_path / "x.tar", ("0.json", asked()), member))


def test_a_truncated_shard_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "x.tar", ("0.json", asked()), ("1.json", asked())).read_bytes()
    header = whole.index(b"1.json")
    for end in (100, header - 1, header, header + 100, header + 512, header + 520, header + 1024):
        (tmp_path / "x.tar").write_bytes(whole[:end])
        with pytest.raises(ConfigError, match=r"x\.tar: .*truncated or damaged"):
            open_source(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole[:header] + b"?" * 512 + whole[header + 512 :])
    with pytest.raises(ConfigError, match=r"damaged after member '0\.json'"):
        open_source(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole)
    data = open_source(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole[: header + 520])
    with pytest.raises(SampleError, match=r"sample '1': the file ends inside of member '\.json'"):
        data[1]


def test_a_shard_teaches_what_the_same_lines_teach(tmp_path: Path) -> None:
    lines = write_samples(tmp_path, 6)
    members: list[tuple[str, bytes]] = []
    for index, line in enumerate(lines.read_text().splitlines()):
        sample = json.loads(line)
        for part in sample["messages"][0]["content"]:
            if part["type"] == "image":
                members.append((f"{index}.png", (tmp_path / part["image"]).read_bytes()))
                part["image"] = "png"
        members.append((f"{index}.json", json.dumps(sample).encode()))
    shard, processor = open_source(write_shard(tmp_path / "x.tar", *members)), create_processor("kimi-vl-tiny")
    plain = open_source(lines)
    assert len(shard) == len(plain) == 6
    for index in range(6):
        one, two = (processor(source[index]["messages"], labels=True) for source in (plain, shard))
        assert torch.equal(one.ids.tokens, two.ids.tokens)
        assert (one.patches is None) == (two.patches is None) == (index % 3 == 0)
        assert one.patches is None or two.patches is None or torch.equal(one.patches.tokens, two.patches.tokens)


def test_shards_differ_by_their_members(tmp_path: Path) -> None:
    first = open_source(write_shard(tmp_path / "x.tar", ("0.json", asked()))).fingerprint()
    again = open_source(write_shard(tmp_path / "x.tar", ("0.json", asked()))).fingerprint()
    other = open_source(write_shard(tmp_path / "x.tar", ("1.json", asked()))).fingerprint()
    assert first == again != other
    assert json.loads(json.dumps(first)) == first
