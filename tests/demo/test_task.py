"""The task: training batches are the processor's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlkit.demo.digits import load_digits
from vlkit.demo.strips import Strip, make_strips
from vlkit.demo.task import StripPacker, conversation, image_rule, picture
from vlkit.processing import Processor, ProcessorConfig


@pytest.mark.parametrize(("patch_size", "merge_size"), [(8, 2), (4, 2), (5, 1)])
def test_training_batches_equal_the_processors_to_the_bit(patch_size: int, merge_size: int) -> None:
    processor = Processor(ProcessorConfig(image=image_rule(patch_size, merge_size)))
    odd = Strip(np.arange(7 * 31, dtype=np.uint8).reshape(7, 31), "90210")
    strips = [*make_strips(load_digits("seen"), 30, seed=0), odd]

    batch = StripPacker(processor)(strips)
    wanted = processor([conversation(picture(s), s.text) for s in strips], labels=True)

    assert batch.ids.layout == wanted.ids.layout
    assert batch.patches is not None
    assert wanted.patches is not None
    assert batch.patches.layout == wanted.patches.layout
    assert torch.equal(batch.ids.tokens, wanted.ids.tokens)
    assert torch.equal(batch.labels, wanted.labels)
    assert torch.equal(batch.patches.tokens, wanted.patches.tokens)


def test_only_the_answer_and_its_end_are_learned() -> None:
    processor = Processor(ProcessorConfig(image=image_rule(8, 2)))
    (strip,) = make_strips(load_digits("seen"), 1, seed=0, min_digits=4, max_digits=4)
    batch = StripPacker(processor)([strip])
    learned = batch.labels[batch.labels != -100].tolist()
    assert processor.decode(learned) == strip.text
    assert len(learned) == len(strip.text) + 1
    assert learned[-1] in processor.stop_ids


def test_pixels_of_strips_are_about_centred() -> None:
    processor = Processor(ProcessorConfig(image=image_rule(8, 2)))
    values = StripPacker(processor)(make_strips(load_digits("seen"), 200, seed=0)).patches.tokens
    assert abs(values.mean()) < 0.5
    assert 0.6 < values.std() < 1.4
