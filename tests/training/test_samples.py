"""Samples of JSON lines: one sequence over files, and paths that never leave their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlkit.errors import SampleError
from vlkit.training.sources import open_source

ANSWER = {"role": "assistant", "content": "yes"}


def line(**sample: Any) -> str:
    return json.dumps(sample) + "\n"


def asked(image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}]}, ANSWER]


def test_files_are_one_sequence_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line(messages=asked("x.png"), id=1) + "\n" + line(messages=asked("y.png")))
    (tmp_path / "b.jsonl").write_text(line(messages=[{"role": "user", "content": "z"}, ANSWER]))
    data = open_source([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert len(data) == 3
    assert data.where(1).endswith("a.jsonl, line 3")
    assert data.where(2).endswith("b.jsonl, line 1")
    assert data[1]["messages"][0]["content"][0]["image"] == str(tmp_path / "y.png")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "link.png", "file:///etc/x"])
@pytest.mark.parametrize("key", ["image", "image_url", "images", "path"])
def test_images_never_leave_the_folder(tmp_path: Path, path: str, key: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    samples = {
        "image": {"messages": asked(path)},
        "image_url": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": path}}]}]},
        "images": {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [path]},
        "path": {"messages": asked({"path": path})},
    }
    (folder / "a.jsonl").write_text(line(**samples[key]))
    with pytest.raises(SampleError, match=r"a\.jsonl, line 1: .*lies outside"):
        open_source([folder / "a.jsonl"])[0]


def test_what_is_wrong_with_a_path_is_said(tmp_path: Path) -> None:
    for path, message in (
        (f"{tmp_path}/img/1.png", r"is absolute; .*: write 'img/1\.png'"),
        (f"file://{tmp_path}/1.png", r"is absolute; .*: write '1\.png'"),
        ("a\0b", "holds a zero byte"),
    ):
        (tmp_path / "a.jsonl").write_text(line(messages=asked(path)))
        with pytest.raises(SampleError, match=rf"a\.jsonl, line 1: .*{message}"):
            open_source([tmp_path / "a.jsonl"])[0]
