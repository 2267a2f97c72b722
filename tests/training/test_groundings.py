"""Groundings of one image become one conversation; none is lost, none is there twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.conversations import DOCUMENT, image, rng, says
from vlkit.errors import SampleError
from vlkit.processing import Processor
from vlkit.training.groundings import JoinedGroundings, join_groundings
from vlkit.training.sources import open_source


def grounding(screen: Any, index: int, system: str = "Act.") -> dict[str, Any]:
    question = says("user", image(screen), f"click {index}")
    return {
        "messages": [{"role": "system", "content": system}, question, says("assistant", f"at {index}")],
        "id": index,
    }


def pairs(samples: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for sample in samples:
        turns = [each for each in sample["messages"] if each["role"] != "system"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            found[question["content"][-1]["text"], answer["content"][-1]["text"]] += 1
    return found


def num_images(sample: dict[str, Any]) -> int:
    return sum(
        part["type"] == "image" for each in sample["messages"] for part in each["content"] if isinstance(part, dict)
    )


@pytest.mark.parametrize("max_turns", [None, 1, 3, 4])
def test_groundings_of_one_screen_are_joined_and_none_is_lost(max_turns: int | None) -> None:
    samples = [grounding("abc"[index % 3], index) for index in range(20)]
    samples.insert(4, {"messages": DOCUMENT["messages"][1:3], "images": ["b"], "id": 99})
    joined = join_groundings(samples, rng(), max_turns=max_turns)
    assert samples[4] in joined
    rest = [sample for sample in joined if sample is not samples[4]]
    assert pairs(rest) == pairs([sample for sample in samples if sample is not samples[4]])
    assert [num_images(sample) for sample in rest] == [1] * len(rest)
    turns = Counter(sum(each["role"] == "assistant" for each in sample["messages"]) for sample in rest)
    assert turns == {None: {7: 2, 6: 1}, 1: {1: 20}, 3: {3: 6, 1: 2}, 4: {4: 3, 3: 2, 2: 1}}[max_turns]
    again = join_groundings(samples, rng(), max_turns=max_turns)
    assert joined == again
    assert max_turns == 1 or joined != join_groundings(samples, rng(1), max_turns=max_turns)


def test_a_conversation_of_groundings_never_exceeds_its_tokens() -> None:
    processor = Processor()
    screens = {name: np.zeros((56, 56 * index, 3), np.uint8) for index, name in enumerate("ab", start=1)}
    samples = [grounding(screens["ab"[index % 2]], index) for index in range(15)]

    def measure(sample: dict[str, Any]) -> int:
        return processor.measure(sample["messages"], sample.get("images"), labels=True).tokens

    joined = join_groundings(samples, rng(), max_tokens=100, measure=measure)
    assert pairs(joined) == pairs(samples)
    assert 1 < len(joined) < 8
    sizes = [processor(each["messages"], labels=True).ids.layout.num_tokens for each in joined]
    assert max(sizes) <= 100
    alone = join_groundings(samples, rng(), max_tokens=3, measure=measure)
    assert len(alone) == 15
    with pytest.raises(ValueError, match="needs measure"):
        join_groundings(samples, rng(), max_tokens=3)


def test_only_what_is_alike_is_joined() -> None:
    beside = {"messages": [says("user", image(), "x"), says("assistant", "y")], "images": ["a"]}
    bare = {"messages": [says("user", image("a"), "z"), says("assistant", "w")]}
    two = {"messages": [says("user", image("a"), image("a"), "z"), says("assistant", "w")]}
    film = {"messages": [says("user", image("a"), {"type": "video", "video": "v"}), says("assistant", "w")]}
    tools = {**bare, "tools": [{"name": "f"}]}
    long = {"messages": [*bare["messages"], *bare["messages"]]}
    pair = {"messages": bare["messages"][:1], "chosen": [], "rejected": []}
    others = [
        two,
        film,
        tools,
        long,
        pair,
        grounding("a", 0, "Other."),
        grounding(b"a", 1),
        {"image": "a", "text": "b"},
    ]
    joined = join_groundings([*others, beside, bare], rng())
    assert joined[:-1] == others
    assert num_images(joined[-1]) == 1
    assert len(joined[-1]["messages"]) == 4
    assert len(join_groundings([grounding(b"a", 1), grounding(b"a", 2), grounding(b"b", 3)], rng())) == 2


def test_a_source_of_groundings_is_one_of_conversations(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (60, 60)).save(tmp_path / f"{name}.png")
    samples = [grounding(f"{'ab'[index % 2]}.png", index) for index in range(9)]
    samples[4]["messages"][1]["content"][0] = image("gone.png")
    lines = [json.dumps(sample) for sample in samples]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], "{", *lines[5:]]))
    source, processor = open_source(tmp_path / "a.jsonl"), Processor()

    def measure(sample: dict[str, Any]) -> int:
        return processor.measure(sample["messages"], labels=True).tokens

    joined = JoinedGroundings(source, seed=3, max_turns=3, max_tokens=200, measure=measure)
    assert sorted(place for group in joined.groups for place in group) == list(range(10))
    assert sorted(map(len, joined.groups)) == [1, 1, 1, 1, 3, 3]
    good = [joined[index] for index, group in enumerate(joined.groups) if 5 not in group]
    assert pairs(good) == pairs(samples)
    broken = joined.groups.index([5])
    with pytest.raises(SampleError, match=r"a\.jsonl, line 6"):
        joined[broken]
    assert joined.where(broken) == f"{tmp_path}/a.jsonl, line 6"
    assert joined.where(next(i for i, g in enumerate(joined.groups) if len(g) == 3)).endswith(" and 2 joined with it")
    again = JoinedGroundings(source, seed=3, max_turns=3, max_tokens=200, measure=measure)
    assert again.groups == joined.groups
    assert again.fingerprint() == joined.fingerprint() != JoinedGroundings(source, seed=4).fingerprint()


def test_what_no_measure_can_be_taken_of_stays_alone() -> None:
    def measure(sample: dict[str, Any]) -> int:
        if any("click 2" in str(each) for each in sample["messages"]):
            raise SampleError("broken")
        return 1

    joined = join_groundings([grounding("a", index) for index in range(5)], rng(), max_tokens=9, measure=measure)
    assert sum(len(sample["messages"]) == 3 and "click 2" in str(sample) for sample in joined) == 1
    assert sum(pairs(joined).values()) == 5
