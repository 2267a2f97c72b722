"""What a run is made of, from its config: the model on meta and with weights, the optimizer, and what has to stay the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlkit.errors import ConfigError, SequenceTooLongError, VlkitError
from vlkit.models import VisionLanguageModel
from vlkit.models.factory import compose, create_model, create_processor
from vlkit.models.pretrained import from_pretrained, read_config
from vlkit.optim import Muon, freeze, muon_param_groups
from vlkit.processing import Processor
from vlkit.registry import component
from vlkit.training.config import TrainConfig
from vlkit.training.groundings import JoinedGroundings
from vlkit.training.lora import add_lora, is_adapter
from vlkit.training.mixture import Mixture
from vlkit.training.options import DataSource, ModelSource
from vlkit.training.order import Draws
from vlkit.training.prompts import CurriculumDraws, PrioritisedDraws, SuccessRates, difficulties
from vlkit.training.ranks import Ranks
from vlkit.training.reader import Reader
from vlkit.training.recompute import checkpoint_blocks
from vlkit.training.rope_theta import set_rope_theta
from vlkit.training.sources import Source, open_source
from vlkit.training.tasks.task import Draw, Item, Task

TASK = "task"
"""The part of what trains that belongs to the task, where that has modules of its own."""


def describe_model(config: TrainConfig) -> tuple[VisionLanguageModel, Processor]:
    """The model on meta, and its processor.

    Raises:
        ConfigError: Parts that do not fit or are too large for torch, or a model without a processor.
    """
    source, dtype = config.model, getattr(torch, config.dtype)
    try:
        if source.folder is not None:
            model = create_model(read_config(Path(source.folder)), dtype=dtype, device="meta")
        elif source.name is not None:
            model = create_model(source.name, dtype=dtype, device="meta", **(source.overrides or {}))
        else:
            model = compose(**_parts(source), dtype=dtype, device="meta")
    except RuntimeError as error:  # of torch; without memory all that can fail is the size
        if isinstance(error, VlkitError):
            raise
        raise ConfigError(
            "TrainConfig.model: this model cannot be built, even without memory; look at its sizes (torch says: "
            f"{str(error).splitlines()[0]})"
        ) from error
    if config.lora is not None:
        add_lora(model, config.lora)
    if source.processor is not None or source.folder is not None:
        return model, Processor.from_pretrained(source.processor or source.folder or "")
    return model, create_processor(source.name if source.name and not source.overrides else model)


def _parts(source: ModelSource) -> dict[str, Any]:
    """What `compose` takes: a registered name as it is, a table with "type" as the config that it means."""
    chosen: dict[str, Any] = {}
    for kind in ("vision", "llm", "projector"):
        value = getattr(source, kind)
        if not isinstance(value, Mapping):
            if value is not None:
                chosen[kind] = value
            continue
        fields = dict(value)
        name = fields.pop("type", None)
        if not isinstance(name, str):
            raise ConfigError(f"ModelSource.{kind}: 'type' must name a registered {kind}, found {name!r}")
        if kind == "projector":  # its widths follow its neighbours where nobody wrote them
            vision, llm = (_config_of(k, chosen[k]) for k in ("vision", "llm"))
            fields = {"in_dim": vision.out_dim, "out_dim": llm.dim, **fields}
        chosen[kind] = component(kind, name).configs[name].replace(**fields)
    return chosen


def _config_of(kind: str, part: Any) -> Any:
    return component(kind, part).configs[part] if isinstance(part, str) else part


def enter_stage(model: VisionLanguageModel, config: TrainConfig) -> None:
    """What a stage changes of a model that the stages before have left: its wavelengths, what learns, what is recomputed."""
    if config.rope_theta is not None:
        set_rope_theta(model, config.rope_theta, max_positions=config.max_positions)
    freeze_parts(model, config)
    every = {"none": 0, "selective": "selective", "full": 1}[config.activation_checkpointing]
    if every or any("forward" in vars(block) for block in model.modules()):
        checkpoint_blocks(model, every=every)  # type: ignore[arg-type]


def freeze_parts(model: nn.Module, config: TrainConfig) -> None:
    """What the config freezes records no gradients, all else does.

    Of the names that fit a parameter, in `train`, `optimizer.freeze` and `optimizer.thaw`, the one with most words decides. In
    parts with adapters only these can learn; where `train` does not say what learns, they are all of the model that does.

    Args:
        model: The model, or it and the modules of the task. Of the model alone, names of the task are not looked at.

    Raises:
        ConfigError: A part that is not there, or nothing is left to train.
    """
    options = config.optimizer
    train = config.train
    if train is None:
        adapted = () if config.lora is None else (*config.lora.parts, TASK)
        train = tuple(name for name in adapted or ("",) if name not in options.freeze)
    trained, frozen = [*train, *options.thaw], [*options.freeze, *(() if "" in train else ("",))]
    has_task = TASK in dict(model.named_children())
    about_task = [name for name in (*(config.train or ()), *options.thaw) if name.split(".")[0] == TASK]
    if not has_task:
        trained, frozen = ([name for name in names if name.split(".")[0] != TASK] for names in (trained, frozen))
    freeze(model, frozen, thaw=trained)
    if config.lora is not None:
        for name, parameter in model.named_parameters():
            if name.split(".")[0] in config.lora.parts and not is_adapter(name):
                parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()) and not (about_task and not has_task):
        raise ConfigError("OptimizerOptions.freeze: all parts are frozen, nothing is left to train")


def with_modules(model: VisionLanguageModel, modules: nn.Module | None, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """The model, or its parts beside the modules of the task, under the name "task".

    Raises:
        ConfigError: Modules of a task go with a model whose parts are sharded.
    """
    if modules is None:
        return model
    if config.ranks.sharding == "fsdp" and ranks.group is not None:
        raise ConfigError("this objective has modules of its own, which are not sharded: set ranks.sharding = 'zero1'")
    return nn.ModuleDict({**dict(model.named_children()), TASK: modules})


def trained_parts(
    model: VisionLanguageModel, modules: nn.Module | None, config: TrainConfig, ranks: Ranks
) -> nn.Module:
    """Collective. What `with_modules` gives, on this rank's device, frozen and in training as is asked for.

    Raises:
        ConfigError: The same.
        RankError: Ranks have other weights of the task.
    """
    whole = with_modules(model, modules, config, ranks)
    if modules is not None:
        modules.to(ranks.device)
        sums = [repr(float(p.detach().double().sum())) for p in modules.parameters()]
        ranks.check_equal({"sums of weights": sums}, "the ranks do not begin with the same weights of the objective")
    freeze_parts(whole, config)
    whole.train()
    for part in whole.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()  # frozen: nothing of it is to be random
    return whole


def open_sources(config: TrainConfig, processor: Processor) -> tuple[Source, ...]:
    """The samples of every stream."""
    data = config.data
    sources = tuple(open_source(files) for files in ([s.files for s in data.streams] or [data.files]))
    if not data.join_groundings:
        return sources

    def num_tokens(sample: dict[str, Any]) -> int:
        images, videos, tools = (sample.get(name) for name in ("images", "videos", "tools"))
        return processor.measure(sample["messages"], images, videos, tools=tools, labels=data.labels).tokens

    return tuple(
        JoinedGroundings(source, seed=config.seed, max_tokens=data.max_tokens, measure=num_tokens) for source in sources
    )


def make_draws(data: DataSource, sources: Sequence[Source], task: Task, *, seed: int) -> Draws:
    """What is drawn next.

    Raises:
        ConfigError: Draws by success, and an objective that judges no answers.
    """
    sizes = [len(source) for source in sources]
    if data.draws == "curriculum":
        start, until = data.curriculum or (0.2, 0.8)
        return CurriculumDraws([difficulties(source) for source in sources], start=start, until=until, seed=seed)
    if data.draws == "prioritised":
        rates = getattr(getattr(task, "rollouts", None), "rates", None)
        if not isinstance(rates, SuccessRates):
            raise ConfigError("data.draws = 'prioritised' needs an objective that judges answers, such as grpo")
        return PrioritisedDraws(sizes, rates, seed=seed)
    return Mixture(sizes, [stream.share for stream in data.streams] or None, seed=seed, shuffle=data.shuffle)


def make_reader(
    config: TrainConfig,
    sources: Sequence[Source],
    task: Task,
    model: VisionLanguageModel,
    ranks: Ranks,
    *,
    seed: int,
) -> Reader[Item]:
    """What draws and prepares the samples of every step, and divides them among the ranks."""
    data, positions = config.data, model.llm.config.max_positions
    limits = [(data.max_tokens, f"data.max_tokens = {data.max_tokens}")] if data.max_tokens else []
    limits += [(positions, f"the {positions} positions of the decoder")] if positions else []

    def prepare(sample: dict[str, Any], draw: Draw) -> Item:
        item = task.prepare(sample, draw)
        longest = max(item.batch.ids.layout.lengths)
        for limit, name in limits:
            if longest > limit:
                raise SequenceTooLongError(
                    f"{longest} tokens, more than {name}; cut the sample, or leave such samples out with "
                    "data.corrupt = 'skip'"
                )
        return item

    return Reader(
        sources,
        make_draws(data, sources, task, seed=seed),
        prepare,
        measure=task.measure,
        batch=config.samples_per_step,
        packs=config.packs,
        pack_tokens=data.pack_tokens if config.packs else None,
        pack_patches=data.pack_patches if config.packs else None,
        micro_samples=config.micro_batch,
        micro_tokens=config.micro_batch_tokens or data.pack_tokens,
        micro_patches=data.pack_patches,
        skip_corrupt=data.corrupt == "skip",
        skip_long=data.too_long == "skip",
        rank=ranks.rank,
        num_ranks=ranks.size,
        workers=data.workers,
    )


def fingerprint(
    config: TrainConfig, model: VisionLanguageModel, processor: Processor, sources: Sequence[Source]
) -> dict[str, Any]:
    """What has to be the same on all ranks, and when the run is resumed; as JSON."""
    parameters = [
        [name, list(p.shape), str(p.dtype).removeprefix("torch."), "trained" if p.requires_grad else "frozen"]
        for name, p in model.named_parameters()
    ]
    values = {
        "model": model.config.to_dict(),
        "parameters": parameters,
        "processor": processor.config.to_dict(),
        "data": [entry for source in sources for entry in source.fingerprint()],
        "seed": config.seed,
        "shuffle": config.data.shuffle,
        "objective": (config.objective or {}).get("kind", "next-token"),
        "draws": config.data.draws,
    }
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def build_model(
    config: TrainConfig,
    shapes: VisionLanguageModel,
    ranks: Ranks,
    *,
    folder: Path | str | None = None,
    adapted: bool = True,
    prepare: Callable[[VisionLanguageModel], object] = lambda model: None,
) -> VisionLanguageModel:
    """Collective. The model with weights on this rank's device: all of them, or the rank's share.

    Without a folder the weights are drawn from the config's seed, the same for any number of ranks.

    Args:
        shapes: The model on meta.
        folder: Where the weights are, instead of what the config says.
        adapted: Whether it gets the adapters that the config asks for.
        prepare: Called with the model before its parts are sharded.

    Raises:
        CheckpointError: The folder cannot be read.
        RankError: Ranks have other weights.
    """
    dtype, folder = getattr(torch, config.dtype), folder or config.model.folder
    torch.manual_seed(config.seed)
    if config.ranks.sharding == "fsdp" and ranks.group is not None:
        from vlkit.training.sharding import load_sharded, make_mesh

        model = load_sharded(
            folder or shapes.config,
            make_mesh(replicate=config.ranks.replicate, expert_parallel=config.ranks.expert_parallel),
            dtype=dtype,
            param_dtype=None if config.compute_dtype is None else getattr(torch, config.compute_dtype),
            prepare=prepare,
        )
        model.published_dtypes = {}  # what was trained is saved in the dtype that it was trained in
    else:
        with ranks.together():
            if folder is not None:
                model = from_pretrained(folder, dtype=dtype, mapped=False)
            else:
                model = create_model(shapes.config, dtype=dtype, device="cpu")
            if adapted and config.lora is not None:
                add_lora(model, config.lora)
            prepare(model)
        sums = [repr(float(p.detach().double().sum())) for p in model.parameters()]
        ranks.check_equal({"sums of weights": sums}, "the ranks do not begin with the same weights")
        model.to(ranks.device)
    return model


def make_optimizer(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Muon:
    """Muon, or AdamW for all, with the learning rates of the parts."""
    options = config.optimizer
    rates = options.part_lr
    if options.layer_decay:
        rates = {"": options.lr, **(rates or {})}  # "" fits every name, and any other part more closely
    groups = muon_param_groups(
        model,
        muon=options.muon,
        adamw=options.adamw if options.kind == "muon" else ("",),  # which is in every name
        decay_vectors=options.decay_vectors,
        lr=rates,
        layer_decay=options.layer_decay,
        splits=options.splits,
    )
    for group in groups:
        if options.kind == "muon" and group["algorithm"] == "adamw":
            group["lr"] = group.get("lr", options.lr) * options.vector_rate
    over_ranks: dict[str, Any] = {}
    if ranks.group is not None and config.ranks.sharding == "zero1":
        over_ranks = {"process_group": ranks.group, "grad_sync": "reduce_scatter", "partition": options.partition}
    return Muon(
        groups,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        adjust_lr=options.adjust_lr,
        ns=options.ns,
        betas=options.betas,
        adam_eps=options.adam_eps,
        max_grad_norm=options.max_grad_norm,
        **over_ranks,
    )
