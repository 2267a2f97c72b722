"""Which samples a step takes, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.samples import write_samples
from vlkit.errors import SampleError
from vlkit.models.factory import create_processor
from vlkit.training.data import Conversations, StepReader, micro_batches, num_targets, order

ANSWER = {"role": "assistant", "content": "yes"}


def line(**sample: Any) -> str:
    return json.dumps(sample) + "\n"


def asked(image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}]}, ANSWER]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_ranks_share_the_same_samples(tmp_path: Path, num_ranks: int) -> None:
    data = Conversations([write_samples(tmp_path)])
    processor = create_processor("kimi-vl-tiny")
    for position in (0, 5, 10, 60):
        parts = [
            StepReader(data, processor, batch=5, rank=rank, num_ranks=num_ranks).samples(position)
            for rank in range(num_ranks)
        ]
        assert [index for part in parts for index in part] == order(13, range(position, position + 5), seed=0)


def test_every_epoch_has_every_sample_once_in_another_order() -> None:
    first, second = order(13, range(13), seed=0), order(13, range(13, 26), seed=0)
    assert sorted(first) == sorted(second) == list(range(13))
    assert first != second
    assert first != order(13, range(13), seed=1)
    assert order(13, range(12, 15), seed=0) == [first[-1], *second[:2]]
    assert order(13, range(11, 15), seed=0, shuffle=False) == [11, 12, 0, 1]


def test_samples_prepared_ahead_are_the_same(tmp_path: Path) -> None:
    data = Conversations([write_samples(tmp_path)])
    processor = create_processor("kimi-vl-tiny")
    with StepReader(data, processor, batch=4) as plain, StepReader(data, processor, batch=4, workers=2) as ahead:
        for position in (0, 4, 8, 20):  # the last is not the one begun ahead
            a, b = plain.read(position), ahead.read(position)
            assert a[1:] == b[1:]
            assert a.micro_batches[0].ids.tokens.tolist() == b.micro_batches[0].ids.tokens.tolist()
            assert a.num_targets == num_targets(a.micro_batches[0]) > 0


def test_micro_batches_take_neighbours_while_they_fit() -> None:
    assert micro_batches([3, 3, 9, 1, 1], None, 6) == [(0, 2), (2, 3), (3, 5)]
    assert micro_batches([3, 3, 3], 2, None) == [(0, 2), (2, 3)]
    assert micro_batches([], 2, 5) == []


def test_files_are_one_sequence_and_empty_lines_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line(messages=asked("x.png"), id=1) + "\n" + line(messages=asked("y.png")))
    (tmp_path / "b.jsonl").write_text(line(messages=[{"role": "user", "content": "z"}, ANSWER]))
    data = Conversations([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
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
        Conversations([folder / "a.jsonl"])[0]


def test_what_is_wrong_with_a_path_is_said(tmp_path: Path) -> None:
    for path, message in (
        (f"{tmp_path}/img/1.png", r"is absolute; .*: write 'img/1\.png'"),
        (f"file://{tmp_path}/1.png", r"is absolute; .*: write '1\.png'"),
        ("a\0b", "holds a zero byte"),
    ):
        (tmp_path / "a.jsonl").write_text(line(messages=asked(path)))
        with pytest.raises(SampleError, match=rf"a\.jsonl, line 1: .*{message}"):
            Conversations([tmp_path / "a.jsonl"])[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"id": 3}', "'messages' must be a list"),
        ('{"messages": [], "image": "x"}', "unknown field 'image'"),
        ('{"messages": []}', "must be a list of messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        ('{"messages": [[{"role": "user", "content": "x"}]]}', "must be a list of messages"),
        (line(messages=asked("gone.png")), r"gone\.png"),
    ],
)
def test_a_corrupt_sample_is_refused_or_counted(tmp_path: Path, text: str, message: str) -> None:
    good = line(messages=[{"role": "user", "content": "z"}, ANSWER])
    (tmp_path / "a.jsonl").write_text(good + text + "\n")
    data, processor = Conversations([tmp_path / "a.jsonl"]), create_processor("kimi-vl-tiny")
    with pytest.raises(SampleError, match=rf"a\.jsonl.*line 2.*{message}"):
        StepReader(data, processor, batch=2).read(0)
    share = StepReader(data, processor, batch=2, skip_corrupt=True).read(0)
    assert share.corrupt == 1
    assert share.micro_batches[0].ids.layout.num_items == 1


def test_a_sample_that_is_too_long_is_corrupt(tmp_path: Path) -> None:
    data = Conversations([write_samples(tmp_path)])
    with pytest.raises(SampleError, match=r"more than data\.max_tokens = 20"):
        StepReader(data, create_processor("kimi-vl-tiny"), batch=13, max_tokens=20).read(0)
