"""VisionLanguageModel: a tower, a projector and a decoder, joined where the text has image placeholders.

    batch.patches -> vision -> projector -> tokens of every image ┐
    batch.ids     -> llm.embed -----------------------------------┴-> merge -> llm -> hidden -> head -> logits

It is the only module in this folder: a family is a config, and a table of names.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlkit.config import Config, Count, Size
from vlkit.errors import ConfigError, LayoutError, PlaceholderMismatchError
from vlkit.layers.cache import Cache
from vlkit.layers.moe import Routing
from vlkit.objectives import chunked_cross_entropy, next_token_targets
from vlkit.packing import Batch, Layout, Packed
from vlkit.registry import KINDS, component, component_of


class VLMConfig(Config):
    """What a vision-language model is made of.

    Attributes:
        vision: Config of a registered vision tower.
        projector: Config of a registered projector; takes the tower's width to the decoder's.
        llm: Config of a registered decoder.
        image_token_id: The id whose embeddings are replaced by image tokens.
        stop_ids: Ids that end a generated answer.
        family: Name of the Hub layout in which the model is saved; None for vlkit's own.
        loss_chunk: Tokens whose logits exist at once while the loss is computed.
    """

    vision: Config
    projector: Config
    llm: Config
    image_token_id: Count
    stop_ids: tuple[Count, ...] = ()
    family: str | None = None
    loss_chunk: Size = 1024

    def check(self) -> None:
        parts: dict[str, Any] = {kind: getattr(self, kind) for kind in KINDS}
        for kind, part in parts.items():
            if component_of(part).kind != kind:
                raise ConfigError(f"VLMConfig.{kind}: {type(part).__name__} is a {component_of(part).kind} config")
        vision, projector, llm = parts.values()
        if projector.in_dim != vision.out_dim:
            raise ConfigError(
                f"the projector takes {projector.in_dim} channels but the tower gives {vision.out_dim}; "
                f"set projector.in_dim={vision.out_dim}, or let vlkit.compose fit it"
            )
        if projector.out_dim != llm.dim:
            raise ConfigError(
                f"the projector gives {projector.out_dim} channels but the decoder is {llm.dim} wide; "
                f"set projector.out_dim={llm.dim}, or let vlkit.compose fit it"
            )
        for name, ids in (("image_token_id", (self.image_token_id,)), ("stop_ids", self.stop_ids)):
            for token in ids:
                if token >= llm.vocab_size:
                    raise ConfigError(f"VLMConfig.{name}: {token} lies outside the vocabulary of {llm.vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for kind in KINDS:
            values[kind] = {"type": component_of(getattr(self, kind)).name, **values[kind]}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, found {type(values).__name__}")
        parts = {}
        for kind in KINDS:
            part = values.get(kind)
            if isinstance(part, Mapping):
                fields = dict(part)
                name = fields.pop("type", None)
                if not isinstance(name, str):
                    raise ConfigError(f"{cls.__name__}.{kind}: 'type' must name a registered {kind}, found {name!r}")
                parts[kind] = component(kind, name).config.from_dict(fields)
        return super().from_dict({**values, **parts})


@dataclass(frozen=True)
class Output:
    """What a forward gives.

    Attributes:
        hidden: Output of the decoder's last norm.
        head: Turns hidden rows [tokens, dim] into logits [tokens, vocab].
        loss: Mean next-token cross-entropy in nats over the tokens with a label; None if the batch has no labels.
        num_targets: How many tokens the loss is a mean of.
        routing: Which experts every token chose, one per MoE layer; empty for dense decoders.
    """

    hidden: Packed
    head: Callable[[Tensor], Tensor]
    loss: Tensor | None = None
    num_targets: int = 0
    routing: tuple[Routing, ...] = ()

    @cached_property
    def logits(self) -> Packed:
        """Logits of all tokens; made at the first look, because training needs only the loss."""
        with torch.set_grad_enabled(self.hidden.tokens.requires_grad):  # as when the forward ran
            return self.hidden.with_tokens(self.head(self.hidden.tokens))

    def unpack(self) -> list[Tensor]:
        """Logits [length, vocab] of each sequence."""
        return self.logits.unpack()

    @property
    def expert_load(self) -> Int[Tensor, "layers experts"] | None:
        """Tokens that each expert of each MoE layer received, or None for dense decoders."""
        if not self.routing:
            return None
        return torch.stack([routing.load(routing.scores.shape[-1]) for routing in self.routing])


class VisionLanguageModel(nn.Module):
    """A vision tower, a projector and a decoder.

    Args:
        config: The three parts and the placeholder id.

    Attributes:
        published_dtypes: Published name -> dtype, of tensors that the checkpoint had in another dtype than the model has, so
            that saving writes them as they were.
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.published_dtypes: dict[str, torch.dtype] = {}
        # Any: what each kind of part promises is in docs/architecture.md, and held by the contract tests.
        self.vision: Any = component_of(config.vision).module(config.vision)
        self.projector: Any = component_of(config.projector).module(config.projector)
        self.llm: Any = component_of(config.llm).module(config.llm)

    def forward(self, batch: Batch, *, cache: Cache | None = None) -> Output:
        """Run a packed batch of sequences with images.

        Args:
            batch: Ids, patches and, for the loss, labels.
            cache: Keys and values of what came before; the batch then holds only what is new.

        Returns:
            Hidden states, logits on demand, the loss if there are labels, and the routing of MoE layers.

        Raises:
            PlaceholderMismatchError: Placeholders and image tokens differ in number.
            TokenError: An id outside the vocabulary.
        """
        if not isinstance(batch, Batch):
            raise LayoutError(
                f"a model takes a Batch, found {type(batch).__name__}; a Processor or model.pack makes one"
            )
        decoded = self.llm(self.embed(batch), positions=batch.positions, cache=cache)
        loss, count = None, 0
        if batch.labels is not None:
            targets = next_token_targets(batch.labels, batch.ids.layout)
            total, count = chunked_cross_entropy(
                decoded.hidden.tokens, self.llm.head_weight, targets, chunk=self.config.loss_chunk
            )
            loss = total / max(count, 1)
        return Output(decoded.hidden, self.llm.head, loss, count, decoded.routing)

    def encode_images(self, patches: Packed) -> Packed:
        """Decoder-wide tokens of every image, from flattened patches.

        Raises:
            LayoutError: Patches of another size than the tower's.
        """
        wanted = self.config.vision.patch_dim  # type: ignore[attr-defined]
        if patches.tokens.ndim != 2 or patches.tokens.shape[1] != wanted:
            raise LayoutError(
                f"the tower takes flattened patches [patches, {wanted}], found {list(patches.tokens.shape)}; "
                "was the image prepared for another model?"
            )
        features = self.vision(patches.to(next(self.vision.parameters()).dtype))
        return self.projector(
            features.to(next(self.projector.parameters()).dtype)
        )  # a frozen tower may be in another dtype

    def embed(self, batch: Batch) -> Packed:
        """Text embeddings with image tokens in place of the placeholders.

        A batch without images runs a blank image of the smallest size and takes nothing from it, while gradients are
        recorded: every parameter then has a gradient on every rank, whatever the rank's data.
        """
        ids = batch.ids.tokens
        text = self.llm.embed(ids)  # [tokens, dim]
        mask = ids == self.config.image_token_id
        if batch.patches is None:
            if bool(mask.any()):
                where = int(batch.ids.layout.item_ids(ids.device)[mask][0])
                raise PlaceholderMismatchError(
                    f"sequence {where}: the batch has {int(mask.sum())} image placeholders but no images"
                )
            if torch.is_grad_enabled() and any(p.requires_grad for p in self._visual_parameters()):
                text = text + 0 * self.encode_images(self._blank_image(ids.device)).tokens.sum()
            return batch.ids.with_tokens(text)
        images = self.encode_images(batch.patches)
        rows = placeholder_rows(mask, batch.ids.layout, images.layout)
        return batch.ids.with_tokens(text.index_copy(0, rows, images.tokens.to(text.dtype)))

    def _visual_parameters(self) -> list[nn.Parameter]:
        return [*self.vision.parameters(), *self.projector.parameters()]

    def _blank_image(self, device: torch.device) -> Packed:
        side = self.config.projector.merge_size  # type: ignore[attr-defined]
        layout = Layout.from_grids([(side, side)])
        return Packed(torch.zeros(layout.num_tokens, self.config.vision.patch_dim, device=device), layout)  # type: ignore[attr-defined]

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue every sequence of a batch. See `vlkit.generation.generate`."""
        from vlkit.generation import generate

        return generate(
            self,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=self.config.stop_ids if stop is None else stop,
            seed=seed,
        )

    def pack(
        self,
        *,
        input_ids: Int[Tensor, "sequences length"],
        attention_mask: Int[Tensor, "sequences length"] | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hws: Int[Tensor, "images 2"] | None = None,
        image_grid_thw: Int[Tensor, "images 3"] | None = None,
        labels: Int[Tensor, "sequences length"] | None = None,
    ) -> Batch:
        """A Batch from the padded tensors that a Hub processor emits.

        Args:
            input_ids: Padded on either side.
            attention_mask: 1 for real tokens; None if nothing is padded.
            pixel_values: Patches of all images in raster order, [patches, channels, P, P] or already flattened.
            image_grid_hws: (rows, columns) of each image in patches, as Kimi-VL's processor names it.
            image_grid_thw: (time, rows, columns), as other processors name it.
            labels: Aligned with input_ids; -100 where nothing is to be learnt.

        Raises:
            LayoutError: Shapes that contradict each other; the message names the image or the tensor.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise LayoutError(
                f"input_ids must be integers [sequences, length], found {input_ids.dtype} {list(input_ids.shape)}"
            )
        for name, sides, count in (("image_grid_hws", image_grid_hws, 2), ("image_grid_thw", image_grid_thw, 3)):
            if sides is not None and (not isinstance(sides, Tensor) or sides.ndim != 2 or sides.shape[1] != count):
                found = list(sides.shape) if isinstance(sides, Tensor) else type(sides).__name__
                raise LayoutError(f"{name} must be a tensor [images, {count}], found {found}")
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        for name, tensor in (("attention_mask", keep), ("labels", labels)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise LayoutError(f"{name} is {list(tensor.shape)}, input_ids is {list(input_ids.shape)}")
        layout = Layout(tuple(keep.sum(1).tolist()))
        if image_grid_hws is not None and image_grid_thw is not None:
            raise LayoutError("give image_grid_hws or image_grid_thw, not both")
        grids = image_grid_hws if image_grid_hws is not None else image_grid_thw
        if (grids is None) != (pixel_values is None):
            raise LayoutError("pixel_values and the image grids come together")
        patches = None
        if grids is not None and pixel_values is not None:
            of_images = Layout.from_grids(grids.tolist())
            if of_images.num_tokens != pixel_values.shape[0]:
                raise LayoutError(
                    f"{of_images.num_items} images with grids {of_images.grids} make {of_images.num_tokens} patches, "
                    f"pixel_values has {pixel_values.shape[0]} rows"
                )
            patches = Packed(pixel_values.flatten(1), of_images)
        return Batch(
            ids=Packed(input_ids[keep].long(), layout),
            patches=patches,
            labels=None if labels is None else labels[keep].long(),
        )

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether tower and decoder recompute each block's activations in the backward instead of keeping them."""
        return bool(self.vision.gradient_checkpointing and self.llm.gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.vision.gradient_checkpointing = self.llm.gradient_checkpointing = enabled

    def num_parameters(self, *, active: bool = False) -> int:
        """Parameters of the model, tied ones once. The selection biases of MoE routers are buffers and do not count.

        Args:
            active: Count only the experts that one token uses.
        """
        total = sum(p.numel() for p in self.parameters())
        return total - self.llm.inactive_parameters() if active else total

    def reset_parameters(self) -> None:
        """Draw all weights anew, children first, so that a part can overrule the defaults of its layers."""
        for module in reversed(list(self.modules())):
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", manifest: bool = False
    ) -> None:
        """Write config and weights in the family's own Hub layout. See `vlkit.models.pretrained.save_pretrained`."""
        from vlkit.models.pretrained import save_pretrained

        save_pretrained(self, folder, max_shard_size=max_shard_size, manifest=manifest)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a temporary folder and upload it. See `vlkit.models.pretrained.push_to_hub`."""
        from vlkit.models.pretrained import push_to_hub

        return push_to_hub(self, repo_id, **options)


def placeholder_rows(mask: Tensor, text: Layout, images: Layout) -> Int[Tensor, " rows"]:
    """Where the tokens of every image go, in the order of the images.

    One look at the mask on the host per forward: placeholders are found by id, so that a batch cannot claim others.

    Args:
        mask: True at placeholders [tokens].
        text: Layout of the sequences.
        images: Layout of the projected images.

    Raises:
        PlaceholderMismatchError: Names the first image whose placeholders are not one run of its length in one sequence.
    """
    rows = mask.nonzero().squeeze(1)
    host = rows.tolist()
    if len(host) == images.num_tokens:
        spans = [
            (host[start], host[start + n - 1], n) for start, n in zip(images.offsets, images.lengths, strict=False)
        ]
        item_of = partial(bisect_right, text.offsets)
        if all(last - first == n - 1 and item_of(first) == item_of(last) for first, last, n in spans):
            return rows
    boundaries = set(text.offsets)
    runs: list[int] = []
    for previous, row in zip([-2, *host], host, strict=False):
        if row != previous + 1 or row in boundaries:
            runs.append(0)
        runs[-1] += 1
    for image, tokens in enumerate(images.lengths):
        found = runs[image] if image < len(runs) else 0
        if found != tokens:
            grid = images.grids[image] if images.grids else None
            raise PlaceholderMismatchError(
                f"image {image}: the text has {found} placeholders but the image gives {tokens} tokens "
                f"(grid {grid} after merging; {len(host)} placeholders in {len(runs)} runs for {images.num_items} images "
                f"with {images.num_tokens} tokens in all). Was the chat rendered with another processor?"
            )
    raise PlaceholderMismatchError(
        f"the text has {len(host)} placeholders in {len(runs)} runs, "
        f"the {images.num_items} images give {images.num_tokens} tokens"
    )
