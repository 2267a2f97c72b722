"""Images before their text, and cuts that spare images."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.conversations import DOCUMENT, image, rng, says
from vlkit.errors import PlaceholderMismatchError, SequenceTooLongError
from vlkit.packing import Batch
from vlkit.processing import CHAT_FORMATS, ImageRule, Processor, ProcessorConfig, VideoRule
from vlkit.training.transforms import cut, images_first


def test_images_go_to_the_front_and_leave_their_index() -> None:
    moved = images_first(DOCUMENT, rng(), 1.0)
    first, last = moved["messages"][1]["content"], moved["messages"][3]["content"]
    assert first[:4] == [image("a"), image(), image("a"), image("c")]
    assert "".join(part["text"] for part in first[4:]) == "first<image 1>second <image 2><image 3>"
    assert "".join(part["text"] for part in last) == "<image 4>and this?"
    assert moved["images"] == ["b"]
    assert [moved["messages"][i] for i in (0, 2)] == [DOCUMENT["messages"][i] for i in (0, 2)]

    def restored(part: dict[str, Any]) -> dict[str, Any]:
        index = re.fullmatch(r"<image (\d+)>", part.get("text", ""))
        return first[int(index[1]) - 1] if index else part

    messages = [
        {**each, "content": [restored(part) for part in each["content"][4 * (place == 1) :]]}
        if each["role"] == "user"
        else each
        for place, each in enumerate(moved["messages"])
    ]
    assert messages == DOCUMENT["messages"]


def test_half_of_the_documents_are_changed_and_the_same_ones_again() -> None:
    def changed(seed: int) -> list[bool]:
        generator = rng(seed)
        return [images_first(DOCUMENT, generator) is not DOCUMENT for _ in range(2000)]

    assert abs(sum(changed(0)) - 1000) < 3 * (2000 * 0.25) ** 0.5
    assert changed(0) == changed(0) != changed(1)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "no image"}],
        [says("user", image("a"), image("b"), "in front already")],
        [says("user", image("a"))],
        [{"role": "assistant", "content": "nobody asked"}],
    ],
)
def test_samples_without_an_image_to_move_stay(messages: Any) -> None:
    sample = {"messages": messages}
    assert images_first(sample, rng(), 1.0) is sample
    generator = rng()
    images_first(sample, generator)
    assert generator.random() == rng().random(2)[1]  # one number is drawn of every sample


def test_an_image_of_a_later_question_goes_before_a_plain_first_one() -> None:
    sample = {"messages": [{"role": "user", "content": "hello"}, says("user", "see", image("a"))]}
    moved = images_first(sample, rng(), 1.0, tag="[{number}]")["messages"]
    assert moved == [says("user", image("a"), "hello"), says("user", "see", "[1]")]
    assert images_first({"image": "a", "text": "b"}, rng(), 1.0) == {"image": "a", "text": "b"}


CHATS: dict[str, Processor] = {
    name: Processor(
        ProcessorConfig(
            chat=CHAT_FORMATS[name].replace(stop=("<|im_end|>",)),
            image=ImageRule(frames_per_patch=2 if video else 1),
            video=VideoRule(min_pixels=784, max_pixels=3136) if video else None,
        )
    )
    for name, video in (("plain", False), ("kimi", False), ("qwen-vl", False), ("chatml", True), ("qwen3-vl", True))
}


def seen(name: str) -> Batch:
    """Text, images of 4 and 6 tokens beside each other, text, perhaps a video of 2 time steps, an answer."""
    small, wide = np.zeros((56, 56, 3), np.uint8), np.ones((56, 84, 3), np.uint8)
    film = [{"type": "video", "video": [small] * 4, "fps": 2.0}] if CHATS[name].config.video else []
    messages = [says("user", "ab", image(small), image(wide), "cd", *film), says("assistant", "yes")]
    return CHATS[name](messages, labels=True)


@pytest.mark.parametrize("name", list(CHATS))
def test_a_cut_spares_images_wherever_it_falls(name: str) -> None:
    batch, processor = seen(name), CHATS[name]
    assert batch.patches is not None
    pads = {processor.image_token_id, processor.video_token_id}
    ids = batch.ids.tokens.tolist()
    tokens = [time * rows * columns // 4 for time, rows, columns in batch.patches.layout.grids or ()]
    last = 0
    for limit in range(1, len(ids) + 2):
        short = cut(batch, limit, processor)
        size = short.ids.layout.num_tokens
        assert last <= size <= limit
        last = size
        assert short.ids.tokens.tolist() == ids[:size]
        assert short.labels is not None
        assert batch.labels is not None
        assert torch.equal(short.labels, batch.labels[:size])
        items = 0 if short.patches is None else short.patches.layout.num_items
        assert sum(id in pads for id in ids[:size]) == sum(tokens[:items])
        assert items == 0 or torch.equal(short.patches.tokens, batch.patches.tokens[: short.patches.layout.num_tokens])  # type: ignore[union-attr]
        assert (short.seconds is None) == (batch.seconds is None or items == 0)
        opened = ("<|vision_start|>", "<|media_start|>", "<|media_content|>", "<img>")
        assert processor.decode(ids[size - 1 : size], skip_special=False) not in opened
    assert short is batch


def test_every_sequence_of_a_batch_is_cut_for_itself() -> None:
    one, two = seen("chatml"), CHATS["chatml"]([says("user", "hi"), says("assistant", "you")], labels=True)
    positions = [torch.arange(3 * each.ids.layout.num_tokens).view(-1, 3) for each in (one, two)]
    with_positions = [
        Batch(each.ids, each.patches, each.labels, place, each.seconds)
        for each, place in zip((one, two), positions, strict=True)
    ]
    limit = two.ids.layout.num_tokens + 1
    together = cut(Batch.concat([with_positions[0], with_positions[1], with_positions[0]]), limit, CHATS["chatml"])
    first = cut(with_positions[0], limit, CHATS["chatml"])
    alone = Batch.concat([first, with_positions[1], first])
    assert together.ids.layout == alone.ids.layout
    for name in ("labels", "positions"):
        assert torch.equal(getattr(together, name), getattr(alone, name))
    assert torch.equal(together.ids.tokens, alone.ids.tokens)
    assert together.seconds == alone.seconds


def test_a_cut_that_leaves_nothing_or_counts_wrongly_is_refused() -> None:
    bare = CHATS["plain"].config.chat.replace(
        turns=tuple(turn.replace(prefix="") for turn in CHATS["plain"].config.chat.turns)
    )
    processor = Processor(ProcessorConfig(chat=bare))
    batch = processor([says("user", image(np.zeros((56, 56, 3), np.uint8)), "x"), says("assistant", "y")])
    with pytest.raises(SequenceTooLongError, match="sequence 0 begins with an image that does not fit into 5 tokens"):
        cut(batch, 5, processor)
    assert cut(batch, 6, processor).ids.layout.num_tokens == 6
    with pytest.raises(ValueError, match="at least one token"):
        cut(batch, 0, processor)
    with pytest.raises(PlaceholderMismatchError, match="4 placeholders, but the patches become 0 tokens"):
        cut(Batch(batch.ids), 6, processor)
