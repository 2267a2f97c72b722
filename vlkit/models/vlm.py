"""VisionLanguageModel: a tower, a projector and a decoder, joined where the text has image placeholders.

    batch.patches -> vision -> projector -> tokens of every image ┐
    batch.ids     -> llm.embed -----------------------------------┴-> merge -> llm -> hidden -> head -> logits
                     positions (in a line, or in time, row and column) ---------^

It is the only module in this folder: a family is a config, and a table of names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlkit.config import Config, Count, Positive, Size
from vlkit.errors import ConfigError, LayoutError, PlaceholderMismatchError
from vlkit.layers.cache import Cache
from vlkit.layers.moe import Routing
from vlkit.llm.output import DecoderOutput, Deep
from vlkit.models.hub_batch import batch_from_hub
from vlkit.models.placeholders import PositionRule, grid_positions, placeholder_rows
from vlkit.objectives import chunked_cross_entropy, next_token_targets
from vlkit.packing import Batch, Layout, Packed
from vlkit.registry import KINDS, component, component_of

Objective = Callable[[DecoderOutput, Tensor], Any]
"""(decoded, weight of the head [vocab, dim]) -> what a step minimises, and what else is to be known of the forward."""


class HubInputs(Config):
    """How the Hub processor of a model's family writes its tensors; `model.pack` translates. A model whose parts are swapped
    keeps it, and with it people keep their data.

    Attributes:
        patch_blocks: Side of the square blocks in which the patches of an image are listed; 1 is row by row.
        video_frames_apart: Every time step of a video is a run of placeholders of its own, with text between them.
        image_span: The ids before and after an image, where the ids between them are placeholders whatever they are.
    """

    patch_blocks: Size = 1
    video_frames_apart: bool = False
    image_span: tuple[Count, Count] | None = None


class VLMConfig(Config):
    """What a vision-language model is made of.

    Attributes:
        vision: Config of a registered vision tower.
        projector: Config of a registered projector; takes the tower's width to the decoder's.
        llm: Config of a registered decoder.
        image_token_id: The id whose embeddings are replaced by image tokens.
        video_token_id: The same for videos; None if the model has only images.
        vision_marks: Ids that texts have before and after an image or a video, where the checkpoint's config names them. The
            model does not read them.
        stop_ids: Ids that end a generated answer.
        positions: "line" counts the tokens of a sequence; "grid" gives every token a position in time, row and column (M-RoPE),
            which the decoder must have rope_sections for.
        ticks_per_second: With "grid", how many positions a second of video takes; None means one per time step.
        hub_inputs: How the tensors are written that `pack` takes.
        family: Name of the Hub layout in which the model is saved; None for vlkit's own.
        loss_chunk: Tokens whose logits exist at once while the loss is computed.
    """

    vision: Config
    projector: Config
    llm: Config
    image_token_id: Count
    video_token_id: Count | None = None
    vision_marks: tuple[Count, Count] | None = None
    stop_ids: tuple[Count, ...] = ()
    positions: Literal["line", "grid"] = "line"
    ticks_per_second: Positive | None = None
    hub_inputs: HubInputs = HubInputs()
    family: str | None = None
    loss_chunk: Size = 512

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
        levels, taps = getattr(projector, "num_levels", 1), getattr(vision, "num_levels", 1)
        if levels not in (1, taps):
            raise ConfigError(
                f"the projector takes {levels} levels of features side by side but the tower gives {taps}; "
                f"set projector.num_levels={taps}, or let vlkit.compose fit it"
            )
        if levels - 1 > llm.num_layers:
            raise ConfigError(
                f"{levels - 1} levels of features are added behind as many layers, but the decoder has {llm.num_layers}"
            )
        if self.positions == "grid" and getattr(llm, "rope_sections", None) is None:
            raise ConfigError(
                f"positions='grid' needs a decoder with rope_sections, which {type(llm).__name__} has not; "
                "set them, or positions='line'"
            )
        if self.ticks_per_second is not None and self.positions != "grid":
            raise ConfigError("ticks_per_second has a meaning only with positions='grid'")
        if self.image_token_id == self.video_token_id:
            raise ConfigError(f"image_token_id and video_token_id are both {self.image_token_id}; they must differ")
        video = () if self.video_token_id is None else (self.video_token_id,)
        for name, ids in (
            ("image_token_id", (self.image_token_id,)),
            ("video_token_id", video),
            ("vision_marks", self.vision_marks or ()),
            ("stop_ids", self.stop_ids),
        ):
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
        value: What the objective gave that `forward` was called with.
    """

    hidden: Packed
    head: Callable[[Tensor], Tensor]
    loss: Tensor | None = None
    num_targets: int = 0
    routing: tuple[Routing, ...] = ()
    value: Any = None

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
        parts_are_sharded: Parameters are gathered from other ranks before they are used, as `vlkit.training.shard_model` sets
            it up: every rank then has to run every part, so a batch without images runs the blank image even where no
            gradient asks for it.
        published_dtypes: Published name -> dtype, of tensors that the checkpoint had in another dtype than the model has, so
            that saving writes them as they were.
        published_layout: Which of the family's sets of names the checkpoint had, the one that is written being 0; saving
            writes the same.
        published_generation: What the checkpoint's generation_config.json held; saving writes it again.
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.parts_are_sharded = False
        self.published_dtypes: dict[str, torch.dtype] = {}
        self.published_layout = 0
        self.published_generation: dict[str, Any] = {}
        # Any: what each kind of part promises is in docs/architecture.md, and held by the contract tests.
        self.vision: Any = component_of(config.vision).module(config.vision)
        self.projector: Any = component_of(config.projector).module(config.projector)
        self.llm: Any = component_of(config.llm).module(config.llm)

    def forward(self, batch: Batch, *, cache: Cache | None = None, objective: Objective | None = None) -> Output:
        """Run a packed batch of sequences with images.

        Args:
            batch: Ids, patches and, for the loss, labels.
            cache: Keys and values of what came before; the batch then holds only what is new.
            objective: Called with the decoder's output and the weight of the head instead of taking the loss of the labels;
                `Output.value` is what it gives. It runs inside of the forward, where sharded weights are whole.

        Returns:
            Hidden states, logits on demand, the loss if there are labels, and the routing of MoE layers.

        Raises:
            PlaceholderMismatchError: Placeholders and image tokens differ in number.
            TokenError: An id outside the vocabulary.
        """
        decoded = self._decode(batch, cache)
        if objective is not None:
            value = objective(decoded, self.llm.head_weight)
            return Output(decoded.hidden, self.llm.head, routing=decoded.routing, value=value)
        loss, count = None, 0
        if batch.labels is not None:
            targets = next_token_targets(batch.labels, batch.ids.layout)
            total, count = chunked_cross_entropy(
                decoded.hidden.tokens, self.llm.head_weight, targets, chunk=self.config.loss_chunk
            )
            loss = total / max(count, 1)
        return Output(decoded.hidden, self.llm.head, loss, count, decoded.routing)

    def decode(self, batch: Batch, *, cache: Cache | None = None) -> DecoderOutput:
        """Tower, projector and decoder: `forward` without head and loss."""
        return self._decode(batch, cache)

    def _decode(self, batch: Batch, cache: Cache | None) -> DecoderOutput:
        if not isinstance(batch, Batch):
            raise LayoutError(
                f"a model takes a Batch, found {type(batch).__name__}; a Processor or model.pack makes one"
            )
        embeddings, deep = self.embed(batch)
        positions = self.positions(batch, cache=cache) if batch.positions is None else batch.positions
        return self.llm(embeddings, positions=positions, cache=cache, deep=deep)

    def encode_images(self, patches: Packed) -> Packed:
        """Decoder-wide tokens of every image and video, from flattened patches: [tokens, levels * dim], the level that enters
        the embeddings first.

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

    def embed(self, batch: Batch) -> tuple[Packed, Deep | None]:
        """Text embeddings with visual tokens in place of the placeholders, and what deeper layers add to those.

        A batch without images runs a blank image of the smallest size and takes nothing from it, while gradients are
        recorded: every parameter then has a gradient on every rank, whatever the rank's data. Where parts are sharded it does
        so always, because ranks with images wait for it.
        """
        ids = batch.ids.tokens
        text = self.llm.embed(ids)  # [tokens, dim]
        mask = self._is_placeholder(ids)
        if batch.patches is None:
            if bool(mask.any()):
                where = int(batch.ids.layout.item_ids(ids.device)[mask][0])
                raise PlaceholderMismatchError(
                    f"sequence {where}: the batch has {int(mask.sum())} image placeholders but no images"
                )
            trained = torch.is_grad_enabled() and any(p.requires_grad for p in self._visual_parameters())
            if trained or self.parts_are_sharded:
                text = text + 0 * self.encode_images(self._blank_image(ids.device)).tokens.sum()
            return batch.ids.with_tokens(text), None
        images = self.encode_images(batch.patches)
        rows = placeholder_rows(mask, batch.ids.layout, images.layout)
        first, *rest = images.tokens.to(text.dtype).split(text.shape[1], dim=1)
        return batch.ids.with_tokens(text.index_copy(0, rows, first)), Deep(rows, tuple(rest)) if rest else None

    def positions(
        self, batch: Batch, *, cache: Cache | None = None, rule: PositionRule = "original"
    ) -> Int[Tensor, "tokens 3"] | None:
        """Position of every token in time, row and column, if the model has those; None leaves them to the decoder.

        Args:
            batch: Ids, grids and, for videos by the clock, seconds.
            cache: What came before; positions go on from there.
            rule: See `vlkit.models.placeholders.grid_positions`.
        """
        if self.config.positions == "line" or batch.patches is None:
            return None  # all axes agree
        visual = self._visual_layout(batch.patches.layout)
        mask = self._is_placeholder(batch.ids.tokens)
        rows = placeholder_rows(mask, batch.ids.layout, visual)[torch.tensor(visual.offsets[:-1])].tolist()
        ticks = None
        if self.config.ticks_per_second is not None:
            if batch.seconds is None and any(t > 1 for t, _, _ in visual.grids or ()):
                raise LayoutError("the positions of a video follow the clock here: give the batch `seconds`")
            ticks = [self.config.ticks_per_second * s for s in batch.seconds or (0.0,) * visual.num_items]
        starts = None if cache is None else cache.next_positions
        return grid_positions(batch.ids.layout, rows, visual, ticks=ticks, starts=starts, rule=rule).to(mask.device)

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        mask = ids == self.config.image_token_id
        return mask if self.config.video_token_id is None else mask | (ids == self.config.video_token_id)

    def _visual_layout(self, patches: Layout) -> Layout:
        """The layout of the projected tokens."""
        return Layout.from_grids(self.config.projector.out_grid(grid) for grid in patches.grids or ())  # type: ignore[attr-defined]

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
        seed: int | Sequence[int] = 0,
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
        image_grid_thw: Int[Tensor, "images 3"] | None = None,
        image_grid_hws: Int[Tensor, "images 2"] | None = None,
        image_grid_hw: Int[Tensor, "images 2"] | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Int[Tensor, "videos 3"] | None = None,
        second_per_grid_ts: Tensor | Sequence[float] | None = None,
        mm_token_type_ids: Int[Tensor, "sequences length"] | None = None,
        image_flags: Int[Tensor, "sequences length"] | None = None,
        labels: Int[Tensor, "sequences length"] | None = None,
    ) -> Batch:
        """A Batch from the padded tensors that the family's own Hub processor emits.

        The order of patches is what `config.hub_inputs` says: Qwen's and AndesVL's processors list an image block by block,
        Kimi-VL's row by row.

        Args:
            input_ids: Padded on either side.
            attention_mask: 1 for real tokens; None if nothing is padded.
            pixel_values: Patches of all images, [patches, channels, P, P] or flattened; or, without grids, whole images
                [images, channels, height, width].
            image_grid_thw: (time, rows, columns) of each image in patches.
            image_grid_hws: (rows, columns), as Kimi-VL's processor names it.
            image_grid_hw: (rows, columns), as AndesVL names it.
            pixel_values_videos: As pixel_values, of all videos.
            video_grid_thw: As image_grid_thw, of all videos.
            second_per_grid_ts: Seconds between the time steps of each video; 1 where the family follows the clock and none
                are given.
            mm_token_type_ids: 0 at text, 1 at images, 2 at videos; checked against the ids.
            image_flags: 1 where an image's tokens stand, whatever the id there.
            labels: Aligned with input_ids; -100 where nothing is to be learnt.

        Raises:
            LayoutError: Shapes that contradict each other; the message names the image or the tensor.
            PlaceholderMismatchError: Token types or image marks that contradict the ids.
        """
        return batch_from_hub(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_grid_hws=image_grid_hws,
            image_grid_hw=image_grid_hw,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=mm_token_type_ids,
            image_flags=image_flags,
            labels=labels,
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
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        manifest: bool = False,
        check_finite: bool | None = None,
    ) -> None:
        """Write config and weights in the family's own Hub layout. See `vlkit.models.pretrained.save_pretrained`."""
        from vlkit.models.pretrained import save_pretrained

        save_pretrained(self, folder, max_shard_size=max_shard_size, manifest=manifest, check_finite=check_finite)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a temporary folder and upload it. See `vlkit.models.pretrained.push_to_hub`."""
        from vlkit.models.pretrained import push_to_hub

        return push_to_hub(self, repo_id, **options)
