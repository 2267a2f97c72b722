"""The task: a strip and a short prompt in, its digits out. How strips become batches, and answers become scores.

strips -> Batch with labels (training: one pass over the pixels, no pictures in between)
strips -> Processor -> Batch -> model.generate -> answers
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vlkit.demo.strips import MAX_DIGITS, Strip
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import ImageRule, Processor, ResizePlan

if TYPE_CHECKING:
    from vlkit.models import VisionLanguageModel

PROMPT = "read"
MEAN, STD = 0.16, 0.25  # of the pixels of strips, in 0..1


def image_rule(patch_size: int, merge_size: int) -> ImageRule:
    """Strips keep their pixels; they are padded to whole blocks of patches."""
    return ImageRule(patch_size=patch_size, merge_size=merge_size, mean=(MEAN,) * 3, std=(STD,) * 3)


def conversation(image: Any, answer: str | None = None) -> list[dict[str, Any]]:
    """What is asked about a strip, and what should be answered."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": PROMPT}]}
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def read(model: VisionLanguageModel, processor: Processor, images: Sequence[Any], *, at_once: int = 128) -> list[str]:
    """What the model reads, greedily.

    Args:
        images: Whatever the processor takes as an image.
        at_once: Images packed into one batch.
    """
    answers = []
    for some in batched_images(images, at_once):
        batch = processor([conversation(image) for image in some])
        answers += [processor.decode(ids) for ids in model.generate(batch, max_new_tokens=MAX_DIGITS + 2)]
    return answers


def batched_images(images: Sequence[Any], at_once: int) -> list[Sequence[Any]]:
    """Images in order, `at_once` at a time."""
    return [images[start : start + at_once] for start in range(0, len(images), at_once)]


def picture(strip: Strip) -> Image.Image:
    return Image.fromarray(strip.pixels)


class StripPacker:
    """Strips to training batches: the processor's own rules, applied to arrays.

    The processor reads pictures of any kind, one by one. Here all are grey arrays that keep their size, and the text
    around them is always the same, so a batch takes a fraction of the time. A test holds that the two agree to the bit.

    Raises:
        ConfigError: From the processor, if its format cannot write the conversation.
    """

    def __init__(self, processor: Processor) -> None:
        self.rule = processor.config.image
        self.image_token = processor.image_token_id
        example = processor(conversation(Image.new("L", (1, 1)), "0"), labels=True)
        ids, labels = example.ids.tokens.tolist(), example.labels.tolist()  # type: ignore[union-attr]
        first = ids.index(self.image_token)
        last = len(ids) - 1 - ids[::-1].index(self.image_token)
        answer = next(i for i, label in enumerate(labels) if label != -100)
        self.before, self.between, self.after = ids[:first], ids[last + 1 : answer], ids[answer + 1 :]
        self.digits = {str(d): processor.tokenizer.encode(str(d)) for d in range(10)}
        self._plan = lru_cache(maxsize=None)(self.rule.target_size)

    def __call__(self, strips: Sequence[Strip]) -> Batch:
        """One batch with labels."""
        plans: list[ResizePlan] = [self._plan(*strip.pixels.shape) for strip in strips]
        patches = np.concatenate([self._patches(s, p) for s, p in zip(strips, plans, strict=True)])
        ids: list[int] = []
        labels: list[int] = []
        lengths = []
        for strip, plan in zip(strips, plans, strict=True):
            asked = [*self.before, *[self.image_token] * self.rule.num_tokens(plan.grid), *self.between]
            answer = [id for digit in strip.text for id in self.digits[digit]] + self.after
            ids += asked + answer
            labels += [-100] * len(asked) + answer
            lengths.append(len(asked) + len(answer))
        return Batch(
            ids=Packed(torch.tensor(ids), Layout(tuple(lengths))),
            patches=Packed(self._normalised(patches), Layout.from_grids(plan.grid for plan in plans)),
            labels=torch.tensor(labels),
        )

    def _patches(self, strip: Strip, plan: ResizePlan) -> np.ndarray[Any, Any]:
        """Grey patches [patches, P * P], uint8."""
        height, width = strip.pixels.shape
        canvas = np.zeros(plan.canvas, np.uint8)
        canvas[:height, :width] = strip.pixels
        (rows, columns), side = plan.grid, self.rule.patch_size
        return canvas.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side * side)

    def _normalised(self, patches: np.ndarray[Any, Any]) -> torch.Tensor:
        """[patches, 3 * P * P], in the processor's order of rounding."""
        grey = torch.from_numpy(patches).div(255.0)
        channels = [(grey - mean) / std for mean, std in zip(self.rule.mean, self.rule.std, strict=True)]
        return torch.cat(channels, dim=1)
