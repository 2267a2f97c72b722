"""Samples of every kind on disk: what is read, and what is refused with its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vlkit.errors import ConfigError, SampleError
from vlkit.training.sources import open_source

ASKED = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]}]
FILM = [{"role": "user", "content": [{"type": "video", "video": ["../a"]}]}]
ANSWER = [{"role": "assistant", "content": "yes"}]


def lines(folder: Path, *samples: dict[str, Any]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def test_every_kind_of_sample_is_read_with_its_paths(tmp_path: Path) -> None:
    video = {"type": "video", "video": ["0.png", {"path": "1.png", "bytes": None}]}
    data = open_source(
        lines(
            tmp_path,
            {"messages": [*ASKED, {**ANSWER[0], "loss": False}], "id": 7},
            {"messages": ASKED, "chosen": ANSWER, "rejected": [{"role": "user", "content": [video]}, *ANSWER]},
            {"messages": ASKED, "answer": "4", "difficulty": 0.5},
            {"image": "a.png", "text": "a cat", "id": "b"},
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a.png"], "tools": None},
        )
    )
    image = str(tmp_path / "a.png")
    assert [len(data), data[0]["messages"][0]["content"][0]["image"], data[3]["image"]] == [5, image, image]
    assert data[0]["messages"][1]["loss"] is False
    assert data[4]["images"] == [image]
    frames = data[1]["rejected"][0]["content"][0]["video"]
    assert frames == [str(tmp_path / "0.png"), {"path": str(tmp_path / "1.png"), "bytes": None}]
    assert data[2]["answer"] == "4"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"messages": ASKED, "chosen": ANSWER}, "'rejected' must be a list of messages, found null"),
        ({"messages": ASKED, "chosen": ANSWER, "rejected": ASKED}, "'rejected' has no message of the assistant"),
        ({"messages": ASKED, "chosen": ANSWER, "rejected": ANSWER, "answer": "x"}, "unknown field 'answer'; a pair has"),
        ({"messages": ASKED, "answer": 4}, "'answer' must be a text, found 4"),
        ({"messages": ASKED, "difficulty": 4}, "'answer' must be a text, found null"),
        ({"messages": ASKED, "answer": "4", "difficulty": True}, "'difficulty' must be a number, found true"),
        ({"image": "a.png"}, "'text' must be a text, found null"),
        ({"image": "a.png", "text": "  "}, "'text' must be a text"),
        ({"text": "a cat"}, "'image' must be an image, found null"),
        ({"image": "a.png", "text": "a cat", "alt": ""}, "unknown field 'alt'; a caption has image, text, id"),
        ({"messages": [{**ANSWER[0], "loss": 1}]}, "'messages', message 0: 'loss' must be true or false, found 1"),
        ({"messages": ASKED, "images": "a.png"}, "'images' must be a list"),
        ({"messages": ASKED, "id": []}, "'id' must be a text or a number"),
        ({"image": {"bytes": "/etc/passwd"}, "text": "x"}, "'/etc/passwd' lies outside of"),
        ({"messages": ASKED, "chosen": ANSWER, "rejected": [*FILM, *ANSWER]}, "'../a' lies outside"),
    ],
)  # fmt: skip
def test_a_malformed_sample_is_refused_with_its_line(tmp_path: Path, sample: dict[str, Any], message: str) -> None:
    data = open_source(lines(tmp_path, {"messages": ASKED}, sample))
    data[0]
    with pytest.raises(SampleError, match=rf"a\.jsonl, line 2: .*{message}"):
        data[1]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "a.jsonl.zst"):
        with pytest.raises(ConfigError, match="unpack it"):
            open_source(tmp_path / name)
    with pytest.raises(ConfigError, match=r"gone\.jsonl: cannot be read"):
        open_source(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match="no files"):
        open_source([])


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "samples.jsonl")
    with pytest.raises(ConfigError, match="a pipe or a device"):
        open_source(tmp_path / "samples.jsonl")
