"""Writer: how the conversations of a run become batches, the same for every task.

    sample, draw --drawn--> images to the front or not, how many pixels --measure--> tokens and patches
                                                                       --batch--> Batch with labels, cut or refused if too long

Measuring and writing decide alike, because both draw from the beginning of the draw's random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vlkit.errors import ConfigError, SequenceTooLongError
from vlkit.packing import Batch
from vlkit.processing import LabelRule, Processor
from vlkit.processing.image_size import image_size
from vlkit.training.resolution import ResolutionSchedule
from vlkit.training.samples import is_image, messages_of, parts_of
from vlkit.training.tasks.task import Draw, Setup
from vlkit.training.transforms import cut, images_first


class Writer:
    """Writes conversations with a processor, by the rules of a run.

    Args:
        processor: Of the model.
        labels: What is learnt of them.
        images_first: How often the images of a sample are moved to its front, from 0 to 1.
        limits: Most tokens of a conversation, and what says so: ((4096, "data.max_tokens = 4096"), ...).
        too_long: What happens to one with more: "refuse" raises, "cut" cuts it at its end.
        whole: Why it may not be cut; "" where it may.
        resolution: How many pixels an image may have; None leaves it to the processor.

    Raises:
        ConfigError: It is to be cut, and may not be.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        labels: bool | LabelRule = True,
        images_first: float = 0.0,
        limits: Sequence[tuple[int, str]] = (),
        too_long: Literal["refuse", "cut"] = "refuse",
        whole: str = "",
        resolution: ResolutionSchedule | None = None,
    ) -> None:
        if whole and too_long == "cut":
            raise ConfigError(f"{whole}: set data.too_long to 'refuse' or 'skip', not to 'cut'")
        self.processor, self.labels, self.images_first = processor, labels, images_first
        self.too_long, self.whole, self.resolution = too_long, whole, resolution
        self.limits = sorted(limits)[:1]  # the lowest decides

    @classmethod
    def of(cls, setup: Setup, whole: str = "") -> Writer:
        """By the rules of a stage's config.

        Raises:
            ConfigError: They ask for cuts, and `whole` says why there can be none.
        """
        data, positions = setup.config.data, setup.model.llm.config.max_positions
        limits = [(data.max_tokens, f"data.max_tokens = {data.max_tokens}")] if data.max_tokens else []
        limits += [(positions, f"the {positions} positions of the decoder")] if positions else []
        return cls(
            setup.processor,
            labels=data.labels,
            images_first=data.images_first,
            limits=limits,
            too_long="cut" if data.too_long == "cut" else "refuse",
            whole=whole,
            resolution=setup.config.resolution,
        )

    def drawn(self, sample: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], int | None]:
        """The sample as it is shown this time, and the most pixels of an image of it."""
        if self.images_first:
            sample = images_first(sample, draw.rng, self.images_first)
        if self.resolution is None:
            return sample, None
        native = self._largest(sample) if self.resolution.mode == "sample" else None
        return sample, self.resolution.pixels(draw.progress, draw.rng, native)

    def _largest(self, sample: Mapping[str, Any]) -> int | None:
        """Pixels of the largest image of a sample, by its header; None without images."""
        parts = [part.get("image") for message in messages_of(sample) for part in parts_of(message) if is_image(part)]
        sources = [*(source for source in parts if source is not None), *(sample.get("images") or ())]
        rule = self.processor.config.reading
        return max((math.prod(image_size(source, rule)) for source in sources), default=None)

    def batch(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Any = None,
        videos: Any = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_pixels: int | None = None,
    ) -> Batch:
        """One conversation as a batch with labels.

        Raises:
            SequenceTooLongError: It has too many tokens, and is not to be cut.
        """
        batch = self.processor(messages, images, videos, tools=tools, labels=self.labels, max_pixels=max_pixels)
        tokens = batch.ids.layout.num_tokens
        return batch if self._kept(tokens) == tokens else cut(batch, self._kept(tokens), self.processor)

    def measure(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Any = None,
        videos: Any = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_pixels: int | None = None,
    ) -> tuple[int, int]:
        """Tokens and patches of what `batch` gives for the same arguments; no image is decoded.

        Of a conversation that is cut they are the most that can be left: a cut may fall before an image.

        Raises:
            SequenceTooLongError: As `batch`.
        """
        tokens, patches = self.processor.measure(
            messages, images, videos, tools=tools, labels=self.labels, max_pixels=max_pixels
        )
        return self._kept(tokens), patches

    def _kept(self, tokens: int) -> int:
        """How many tokens of a conversation stay."""
        for limit, name in self.limits:
            if tokens > limit and self.too_long == "refuse":
                cuts = "" if self.whole else "cut such samples with data.too_long = 'cut', or "
                raise SequenceTooLongError(
                    f"{tokens} tokens, more than {name}; {cuts}leave {'such samples' if self.whole else 'them'} out with "
                    "data.too_long = 'skip'"
                )
            tokens = min(tokens, limit)
        return tokens
