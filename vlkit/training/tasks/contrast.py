"""contrast: SigLIP between images and their texts, and the text as a caption that the model writes behind the image.

    {"image", "text"} -> patches --tower, once--> features -+-> pooling -> unit vectors \\
                         text ids -> text encoder ----------|-> pooling -> unit vectors -> SigLIP over all ranks
                                                            +-> projector -> decoder -> cross-entropy of the text

    loss = SigLIP + caption_weight * caption

Kimi-VL's tower was trained so, with a weight of 2. Its caption decoder cross-attends to the tower; here it is the model's own
decoder behind the model's own projector, which reads the image as a prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.config import Config, Size
from vlkit.errors import PlaceholderMismatchError, SampleError
from vlkit.llm.output import DecoderOutput
from vlkit.models import VisionLanguageModel
from vlkit.objectives.caption import CAPTION_WEIGHT, caption_loss
from vlkit.objectives.siglip import Exchange, repeated_pairs, siglip_loss
from vlkit.packing import Batch, Layout, Packed
from vlkit.training.contrast_heads import ContrastConfig, ContrastHeads
from vlkit.training.options import Factor
from vlkit.training.samples import kind_of
from vlkit.training.tasks.answers import num_learnt, targets_of
from vlkit.training.tasks.task import Draw, Figures, Item, Setup
from vlkit.training.text_encoder import TextEncoderConfig
from vlkit.training.writing import Writer


class ContrastOptions(Config):
    """What is compared, and how.

    Attributes:
        caption_weight: Of the caption loss; with 0 it is only told.
        dim: Of the space that images and texts share.
        pool_heads: Heads of the pooling of images; they divide the width of the tower's features.
        text_dim: Width of the text encoder.
        text_layers: Its blocks.
        text_heads: Its heads.
        text_mlp_dim: Hidden width of its MLPs.
        prompt: What the user says behind the image, before the caption.
        exchange: How ranks see each other's texts: "gather" all at once, "ring" one rank's at a time.
        chunk: Images whose similarities exist at once; None for all of the rank.
    """

    caption_weight: Factor = CAPTION_WEIGHT
    dim: Size = 768
    pool_heads: Size = 12
    text_dim: Size = 768
    text_layers: Size = 12
    text_heads: Size = 12
    text_mlp_dim: Size = 3072
    prompt: str = ""
    exchange: Exchange = "gather"
    chunk: Size | None = None


class Contrast:
    """One image and one text per sample; every text is compared with every image of the step, on all ranks.

    A rank's items are one forward, because the loss is a sum over pairs of them. Equal texts in a step are not counted against
    each other.

    Source: SigLIP, arXiv:2303.15343; with captions: CoCa, arXiv:2205.01917, and Kimi-VL, arXiv:2504.07491, section 2.3.

    Raises:
        ConfigError: Samples are to be cut, or sizes that do not fit each other.
    """

    one_pack = True
    resets_optimizer = False
    lack = "no image with a text"
    remedy = "look at the data files"

    def __init__(self, options: ContrastOptions, setup: Setup) -> None:
        self.options, self.setup = options, setup
        self.writer = Writer.of(setup, whole="an image is compared with the whole of its text")
        vision, decoder = setup.model.config.vision, setup.model.config.llm
        config = ContrastConfig(
            image_dim=vision.out_dim,  # type: ignore[attr-defined]
            dim=options.dim,
            pool_heads=options.pool_heads,
            text=TextEncoderConfig(
                vocab_size=decoder.vocab_size,  # type: ignore[attr-defined]
                dim=options.text_dim,
                num_layers=options.text_layers,
                num_heads=options.text_heads,
                mlp_dim=options.text_mlp_dim,
            ),
        )
        with torch.random.fork_rng(devices=()):  # the same weights on every rank, whatever was drawn before
            torch.manual_seed(setup.config.seed)
            self.modules = ContrastHeads(config).to(getattr(torch, setup.config.dtype))

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        conversation, pixels = self.writer.drawn(self._conversation(sample), draw)
        batch = self.writer.batch(conversation["messages"], max_pixels=pixels)
        ids = self.setup.processor.tokenizer.encode(sample["text"])
        return Item(batch, {"ids": ids, "key": text_key(sample["text"])})

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        conversation, pixels = self.writer.drawn(self._conversation(sample), draw)
        return self.writer.measure(conversation["messages"], max_pixels=pixels)

    def begin(self, items: list[Item], seed: int) -> tuple[list[list[Item]], dict[str, float]]:
        return [items], {}

    def totals(self, items: list[Item]) -> dict[str, float]:
        return {"contrastive": float(len(items)), "caption": float(sum(num_learnt(item.batch) for item in items))}

    def loss(
        self, model: VisionLanguageModel, items: list[Item], batch: Batch, totals: Mapping[str, float]
    ) -> tuple[Tensor, Figures]:
        targets, ranks, heads = targets_of(batch), self.setup.ranks, self.modules
        device = batch.ids.tokens.device
        texts = Packed(
            torch.tensor([token for item in items for token in item.extra["ids"]], dtype=torch.int64, device=device),
            Layout(tuple(len(item.extra["ids"]) for item in items)),
        )
        keys = torch.tensor([item.extra["key"] for item in items], dtype=torch.int64, device=device)

        def objective(decoded: DecoderOutput, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            contrastive = siglip_loss(
                heads.images(self._of_items(features, items)),
                heads.texts(texts),
                heads.similarity.log_scale,
                heads.similarity.bias,
                group=ranks.group,
                exchange=self.options.exchange,
                chunk=self.options.chunk,
                ignore=repeated_pairs(keys, group=ranks.group),
            )
            contrastive = contrastive / ranks.size  # the mean over ranks is the loss, but parts are added up
            hidden, chunk = decoded.hidden.tokens, model.config.loss_chunk
            caption = caption_loss(hidden, head, targets, totals["caption"], chunk=chunk)
            return contrastive + self.options.caption_weight * caption, contrastive, caption

        with output_of(model.vision) as features:
            loss, contrastive, caption = model(batch, objective=objective).value
        parts = {"contrastive": contrastive, "caption": caption}
        return loss, {name: part.detach() * totals[name] for name, part in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _conversation(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The image, the prompt if there is one, and the text as the answer."""
        if "image" not in sample or "text" not in sample:
            raise SampleError(
                f"an image and its text are expected ({{'image': ..., 'text': ...}}), and this is a {kind_of(sample)}"
            )
        content: list[dict[str, Any]] = [{"type": "image", "image": sample["image"]}]
        if self.options.prompt:
            content.append({"type": "text", "text": self.options.prompt})
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": sample["text"]}]}

    def _of_items(self, features: list[Packed], items: list[Item]) -> Packed:
        """The tower's features of the items' images; none of a blank image."""
        if not items:
            return Packed(torch.zeros(0, self.modules.config.image_dim, device=self.setup.ranks.device), Layout(()))
        (found,) = features
        if found.layout.num_items != len(items):
            raise PlaceholderMismatchError(
                f"{len(items)} samples have {found.layout.num_items} images; every text needs exactly one"
            )
        return found


def text_key(text: str) -> int:
    """A number that is the same for the same text, whatever the process: 63 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Any]]:
    """What a module gives in the forwards inside: it runs once for all that look at it."""
    found: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()
