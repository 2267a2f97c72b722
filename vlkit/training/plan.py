"""What training a model over many ranks will take, before any of them is started: memory, operations, traffic.

    name, folder or config -> model on meta -> cost.py    operations and kept memory, by running the model's own code on meta
                                            -> shares.py  what a rank holds and sends, by the partitions that training uses
                                            -> Plan       numbers; print it, or dataclasses.asdict(it) for JSON

    print(plan("kimi-vl-a3b", ranks=64, sharding="fsdp"))

A step is one forward and backward of `micro_batches` micro-batches on every rank, and one update. Numbers are of one rank, the
one with the most where ranks differ. Tokens are spread evenly over experts, every token has a target, and all images have one
size. Not counted: what kernels need while they run, what the allocator does not give back, and buffers of the network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlkit.config import Config, Count, Size
from vlkit.errors import ConfigError, SequenceTooLongError
from vlkit.layers.moe import Experts, MoE
from vlkit.models.factory import create_model, create_processor
from vlkit.models.pretrained import read_config
from vlkit.models.vlm import VisionLanguageModel, VLMConfig
from vlkit.optim import muon_param_groups
from vlkit.processing import ImageRule, Processor
from vlkit.registry import KINDS, list_models, model_spec
from vlkit.summary import count
from vlkit.training.cost import Cost, head_cost, image_cost, text_cost
from vlkit.training.shares import WIDE, Shares, fsdp, whole, zero1

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = Literal["fp32", "bf16"]
MOST_RANKS, MOST_RANKS_BY_MATRIX = 2**17, 2**12  # planned in seconds
LONGEST = 8192  # tokens of a sequence, where nothing is said


class PlanOptions(Config):
    """How a model is to be trained.

    Attributes:
        ranks: Processes, one per accelerator.
        dtype: Of weights and gradients. The optimizer's state is fp32; there are no other copies of the weights.
        compute_dtype: Of products, and with "fsdp" of what is gathered; None is that of the weights. With dtype="fp32" and
            compute_dtype="bf16" the fp32 weights are what others call master weights. Without "fsdp" it is autocast, which
            keeps a bf16 copy of every weight that is multiplied, and the stream between products in fp32.
        optimizer: "muon", with AdamW for what is no matrix, or "adamw" for all.
        sharding: "none": every rank has everything; "zero1": the optimizer's state is divided; "fsdp": weights and gradients
            too.
        partition: How ZeRO-1 divides Muon's state: "flat" in equal ranges of elements, "matrix" by whole matrices.
        replicate: Copies of the sharded model, with "fsdp".
        expert_parallel: Ranks over which the experts of a layer are spread, with "fsdp".
        sequence: Tokens of a sequence, those of its images included; None is 8,192, or the positions where they are fewer.
        images_per_sequence: Images in every sequence; none runs the blank image that keeps ranks alike.
        image: Width and height of an image, in pixels.
        micro_batch: Tokens of one forward on one rank; None is one sequence.
        micro_batches: Forwards of one rank in a step.
        checkpointing: What is computed again in the backward: "none"; "selective": what lies between the products of a block,
            whose results are kept; "full": whole blocks, of which the inputs are kept.
    """

    ranks: Size = 1
    dtype: Dtype = "bf16"
    compute_dtype: Dtype | None = None
    optimizer: Literal["muon", "adamw"] = "muon"
    sharding: Literal["none", "zero1", "fsdp"] = "zero1"
    partition: Literal["flat", "matrix"] = "flat"
    replicate: Size = 1
    expert_parallel: Size = 1
    sequence: Size | None = None
    images_per_sequence: Count = 1
    image: tuple[Size, Size] = (1024, 768)
    micro_batch: Size | None = None
    micro_batches: Size = 1
    checkpointing: Literal["none", "selective", "full"] = "none"

    def check(self) -> None:
        if self.sharding != "fsdp":
            given = [name for name in ("replicate", "expert_parallel") if getattr(self, name) > 1]
            if given:
                raise ConfigError(f"{' and '.join(given)} needs sharding='fsdp', found {self.sharding!r}")
            if (self.dtype, self.compute_dtype) == ("bf16", "fp32"):
                raise ConfigError(
                    f"dtype='bf16' with compute_dtype='fp32' needs sharding='fsdp', found {self.sharding!r}: autocast never "
                    "widens; leave compute_dtype away, or plan with dtype='fp32'"
                )
        most = MOST_RANKS_BY_MATRIX if self.sharding == "zero1" and self.partition == "matrix" else MOST_RANKS
        if self.ranks > most:
            raise ConfigError(
                f"plans are made for at most {most:,} ranks"
                + (" with partition='matrix'; take 'flat'" if most < MOST_RANKS else "")
                + f", found {self.ranks:,}"
            )
        inner = self.replicate * self.expert_parallel
        if self.ranks % inner:
            raise ConfigError(
                f"{self.ranks} ranks cannot be arranged as replicate={self.replicate} x "
                f"expert_parallel={self.expert_parallel} x shards; the product of the two must divide the number of ranks"
            )
        if None not in (self.micro_batch, self.sequence) and self.micro_batch < self.sequence:  # type: ignore[operator]
            raise ConfigError(
                f"a micro-batch of {self.micro_batch:,} tokens holds no sequence of {self.sequence:,}; "
                "shorten the sequence, or enlarge the micro-batch"
            )

    @property
    def autocast(self) -> bool:
        """Products in another dtype than that of the weights, which stay whole."""
        return self.sharding != "fsdp" and self.compute_dtype not in (None, self.dtype)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the sequences in a micro-batch: as many as fit."""
        assert self.sequence is not None
        return (self.sequence,) * ((self.micro_batch or self.sequence) // self.sequence)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Of a part or of the whole.

    Attributes:
        total: All, shared ones once.
        active: Those that one token uses.
        matrices: Those that Muon would take.
    """

    total: int
    active: int
    matrices: int


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Multiplications and additions of forward and backward, attention's products of queries and keys apart.

    Attributes:
        forward: Of all other products.
        backward: The same.
        attention: Forward.
        attention_backward: Backward.
    """

    forward: int
    backward: int
    attention: int
    attention_backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.attention + self.attention_backward

    @classmethod
    def of(cls, cost: Cost) -> Operations:
        return cls(
            forward=cost.forward,
            backward=cost.backward,
            attention=cost.attention,
            attention_backward=cost.attention_backward,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: Parameters, or this rank's part of them.
        gradients: Theirs.
        state: Of the optimizer.
        activations: Kept between forward and backward.
        logits: Of one chunk of the loss, with their gradient.
        gathered: Weights, and gradients not yet averaged, of the groups that exist whole at one moment.
        buffers: Of the optimizer's step: averaged gradients, and of what is in transit at most 64 MiB.
    """

    weights: int
    gradients: int
    state: int
    activations: int
    logits: int
    gathered: int
    buffers: int

    @property
    def peak(self) -> int:
        """The most at one moment: in the backward, or in the optimizer's step, when activations are gone."""
        moment = max(self.activations + self.logits + self.gathered, self.buffers)
        return self.weights + self.gradients + self.state + moment


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What training will take.

    Attributes:
        name: Of the model.
        options: What was asked for.
        parameters: Of "vision", "projector", "llm" and "all".
        image_patches: Patches of one image.
        image_tokens: Tokens that it becomes.
        per_image: Operations of tower and projector on one image.
        per_token: Operations of the decoder and its head on one token of a sequence.
        per_step: Operations of one rank in one step, without those done again.
        recomputed: Operations done again because of checkpointing, of one rank in one step.
        orthogonalisation: Operations of Newton-Schulz in one step, of one rank.
        orthogonalisation_of_all: The sum over all ranks.
        shared_matrices: Matrices that several ranks hold, whose elements travel to who orthogonalises them.
        tokens_per_step: Over all ranks.
        images_per_step: Over all ranks.
        memory: Of one rank.
        sent: Bytes that one rank sends in one step, by what for.
    """

    name: str
    options: PlanOptions
    parameters: dict[str, Parameters]
    image_patches: int
    image_tokens: int
    per_image: Operations
    per_token: Operations
    per_step: Operations
    recomputed: int
    orthogonalisation: int
    orthogonalisation_of_all: int
    shared_matrices: int
    tokens_per_step: int
    images_per_step: int
    memory: Memory
    sent: dict[str, int]

    @property
    def orthogonalisation_share(self) -> float:
        """Newton-Schulz among all operations of a step, of the rank with the most."""
        return self.orthogonalisation / (self.per_step.total + self.recomputed + self.orthogonalisation)

    def __str__(self) -> str:
        from vlkit.training.plan_report import report

        return report(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {k: v for k, v in asdict(self).items() if k != "options"}
        values["options"] = self.options.to_dict()
        values["memory"]["peak"] = self.memory.peak
        values["orthogonalisation_share"] = self.orthogonalisation_share
        for key in ("per_image", "per_token", "per_step"):
            values[key]["total"] = getattr(self, key).total
        return values


def plan(model: str | Path | VLMConfig, options: PlanOptions | None = None, **changes: Any) -> Plan:
    """Plan the training of a model.

    Args:
        model: A registered name, a folder with a saved model, or a config.
        options: See PlanOptions.
        changes: Fields of PlanOptions.

    Raises:
        UnknownModelError: No such name.
        ConfigError: Options that cannot be.
        SequenceTooLongError: A sequence beyond the decoder's positions, or too short for its images.
        ImageError: An image that the model's processor refuses.
    """
    options = (options or PlanOptions()).replace(**changes)
    name, built, rule = _model(model, DTYPES[options.compute_dtype or options.dtype])
    grid, num_tokens = _grid(built, rule, options)
    positions = built.config.llm.max_positions  # type: ignore[attr-defined]
    if options.sequence is None:
        options = options.replace(sequence=min(LONGEST, positions, options.micro_batch or LONGEST))
    assert options.sequence is not None
    if options.sequence > positions:
        raise SequenceTooLongError(
            f"a sequence of {options.sequence:,} tokens, but {name} has {positions:,} positions; plan with "
            f"sequence={positions} or less"
        )
    if options.images_per_sequence * num_tokens > options.sequence:
        raise SequenceTooLongError(
            f"{options.images_per_sequence} images of {num_tokens:,} tokens do not fit into a sequence of "
            f"{options.sequence:,}; fewer or smaller images, or a longer sequence"
        )
    _check_experts(built, name, options)
    parameters = _parameters(built)
    lengths = options.lengths
    images = len(lengths) * options.images_per_sequence
    one = image_cost(built, [grid])
    step = _micro_batch(built, options, one, images, num_tokens)
    per_sequence = text_cost(built, [options.sequence]) + head_cost(built, options.sequence)
    shares = _shares(built, options)  # from here on weights have their own dtype
    if options.autocast:
        step = _under_autocast(built, step, _micro_batch(built, options, image_cost(built, [grid]), images, num_tokens))
    return Plan(
        name=name,
        options=options,
        parameters=parameters,
        image_patches=grid[0] * grid[1] * grid[2],
        image_tokens=num_tokens,
        per_image=Operations.of(one),
        per_token=_shared(Operations.of(per_sequence), options.sequence),
        per_step=Operations.of(step.times(options.micro_batches)),
        recomputed=options.micro_batches * step.block_forward if options.checkpointing == "full" else 0,
        orthogonalisation=shares.orthogonalisation,
        orthogonalisation_of_all=shares.orthogonalisation_of_all,
        shared_matrices=shares.shared_matrices,
        tokens_per_step=options.ranks * options.micro_batches * sum(lengths),
        images_per_step=options.ranks * options.micro_batches * images,
        memory=_memory(built, options, step, shares),
        sent=_sent(built, options, shares, sum(lengths)),
    )


def _model(model: str | Path | VLMConfig, dtype: torch.dtype) -> tuple[str, VisionLanguageModel, ImageRule | None]:
    """Its name, the model on meta, and how its processor sizes images, if that is known."""
    if isinstance(model, VLMConfig):
        return "the model", create_model(model, dtype=dtype, device="meta"), None
    name = str(model)
    if name not in list_models() and Path(model).is_dir():
        config = read_config(Path(model))
        try:
            rule = Processor.from_pretrained(model).config.image
        except ConfigError:
            rule = None
        return name, create_model(config, dtype=dtype, device="meta"), rule
    spec = model_spec(name)
    return name, create_model(name, dtype=dtype, device="meta"), spec.processor.image


def _grid(model: VisionLanguageModel, rule: ImageRule | None, options: PlanOptions) -> tuple[tuple[int, int, int], int]:
    """The grid of patches of one image, and how many tokens it becomes."""
    if rule is None:
        rule = create_processor(model).config.image
    rows, columns = rule.target_size(options.image[1], options.image[0]).grid
    grid = (1, rows, columns)
    time, height, width = model.config.projector.out_grid(grid)  # type: ignore[attr-defined]
    return grid, time * height * width


def _check_experts(model: VisionLanguageModel, name: str, options: PlanOptions) -> None:
    if options.expert_parallel == 1:
        return
    counts = {module.num_experts for module in model.modules() if isinstance(module, Experts)}
    if not counts:
        raise ConfigError(f"expert_parallel={options.expert_parallel}, but {name} has no experts; leave it away")
    for experts in counts:
        each = -(-experts // options.expert_parallel)
        if (options.expert_parallel - 1) * each >= experts:
            raise ConfigError(
                f"{experts} experts cannot be spread over expert_parallel={options.expert_parallel} ranks, {each} each: the last "
                f"would have none; spread them over {-(-experts // each)} ranks"
            )


def _parameters(model: VisionLanguageModel) -> dict[str, Parameters]:
    muon = {id(p) for group in muon_param_groups(model) if group["algorithm"] == "muon" for p in group["params"]}
    parts = {**{kind: getattr(model, kind) for kind in KINDS}, "all": model}
    return {
        name: Parameters(
            total=count(part),
            active=count(part, active=True),
            matrices=sum(p.numel() for p in part.parameters() if id(p) in muon),
        )
        for name, part in parts.items()
    }


def _shares(model: VisionLanguageModel, options: PlanOptions) -> Shares:
    """With weights in their own dtype, which is not that of the products under mixed precision."""
    compute = DTYPES[options.compute_dtype or options.dtype].itemsize
    model.to(DTYPES[options.dtype])
    groups = optimizer_groups(model, options.optimizer)
    if options.sharding == "fsdp":
        return fsdp(
            groups,
            model,
            options.ranks,
            replicate=options.replicate,
            expert_parallel=options.expert_parallel,
            compute_bytes=compute,
        )
    if options.sharding == "zero1" and options.ranks > 1:
        return zero1(groups, model, options.ranks, partition=options.partition)
    return whole(groups, model, options.ranks)


def optimizer_groups(model: VisionLanguageModel, optimizer: str) -> list[dict[str, Any]]:
    """The groups that training gives the optimizer."""
    if optimizer == "muon":
        return list(muon_param_groups(model))
    return [{"params": [p for p in model.parameters() if p.requires_grad], "algorithm": "adamw"}]


def _micro_batch(model: VisionLanguageModel, options: PlanOptions, one: Cost, images: int, num_tokens: int) -> Cost:
    """Of one forward and backward; `one` is that of an image."""
    # Without images a rank runs a blank one, so that all ranks have the same gradients to exchange.
    blank = (1, model.config.projector.merge_size, model.config.projector.merge_size)  # type: ignore[attr-defined]
    seen = one.times(images) if images else image_cost(model, [blank])
    text = text_cost(model, options.lengths, num_visual=images * num_tokens)
    return seen + text + head_cost(model, sum(options.lengths))


def _under_autocast(model: VisionLanguageModel, narrow: Cost, wide: Cost) -> Cost:
    """What is kept where products are bf16, and norms, sums and the stream between blocks fp32.

    Reckoned half-way between a model in bf16 and one in fp32, and a bf16 copy of every weight that is multiplied; tiny decoders
    on CPUs kept 2 to 11 % less.
    """
    embedding = model.llm.embedding.weight
    copies = sum(
        p.numel() * DTYPES["bf16"].itemsize
        for p in model.parameters()
        if p.ndim > 1 and (p is not embedding or p is model.llm.head_weight)
    )
    return replace(
        narrow,
        kept=(narrow.kept + wide.kept) // 2 + copies,
        kept_outside=(narrow.kept_outside + wide.kept_outside) // 2 + copies,
        largest_block=(narrow.largest_block + wide.largest_block) // 2,
        inputs=wide.inputs,
    )


def _memory(model: VisionLanguageModel, options: PlanOptions, step: Cost, shares: Shares) -> Memory:
    width = DTYPES[options.compute_dtype or options.dtype].itemsize
    kept = step.kept
    if options.checkpointing != "none":  # the block at work keeps all for a while
        kept = step.kept_outside + step.inputs + step.largest_block
    if options.checkpointing == "selective":
        kept += step.products
    if options.expert_parallel > 1:  # of every layer, or of the block at work
        slots = _slots(model, sum(options.lengths))
        dim = model.config.llm.dim  # type: ignore[attr-defined]
        # Rows that came, outputs that came back, these times their weights in fp32; and where each belongs.
        kept += (sum(slots) if options.checkpointing == "none" else max(slots)) * (dim * (2 * width + WIDE) + 20)
    chunk = min(model.config.loss_chunk, sum(options.lengths))
    vocabulary = model.config.llm.vocab_size  # type: ignore[attr-defined]
    return Memory(
        weights=shares.weights,
        gradients=shares.gradients,
        state=shares.state,
        activations=kept,
        logits=chunk * vocabulary * (WIDE + (width if width < WIDE else 0)),
        gathered=shares.gathered,
        buffers=shares.buffers,
    )


def _sent(model: VisionLanguageModel, options: PlanOptions, shares: Shares, tokens: int) -> dict[str, int]:
    sent = {what: options.micro_batches * size for what, size in shares.sent_per_micro_batch.items()}
    parallel = options.expert_parallel
    if parallel > 1:
        # Rows to their experts and outputs back; in the backward, the gradients of both. Computing again repeats the forward's.
        passes = 4 if options.checkpointing == "none" else 6
        width = DTYPES[options.compute_dtype or options.dtype].itemsize
        rows = sum(_slots(model, tokens)) * model.config.llm.dim * width  # type: ignore[attr-defined]
        sent["all-to-all of tokens"] = options.micro_batches * passes * rows * (parallel - 1) // parallel
    return {what: size for what, size in {**sent, **shares.sent_per_step}.items() if size}


def _slots(model: VisionLanguageModel, tokens: int) -> list[int]:
    """(token, chosen expert) pairs of every layer with experts."""
    return [tokens * module.router.top_k for module in model.modules() if isinstance(module, MoE)]


def _shared(operations: Operations, count: int) -> Operations:
    return Operations(**{key: round(value / count) for key, value in vars(operations).items()})
