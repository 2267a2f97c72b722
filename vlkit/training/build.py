"""What a run is made of, from its config: the model on meta and with weights, the optimizer, and what has to stay the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlkit.errors import ConfigError, VlkitError
from vlkit.models import VisionLanguageModel
from vlkit.models.factory import compose, create_model, create_processor
from vlkit.models.pretrained import from_pretrained, read_config
from vlkit.optim import Muon, freeze, muon_param_groups
from vlkit.processing import Processor
from vlkit.registry import component
from vlkit.training.config import ModelSource, TrainConfig
from vlkit.training.data import Conversations
from vlkit.training.ranks import Ranks
from vlkit.training.recompute import checkpoint_blocks


def describe_model(config: TrainConfig) -> tuple[VisionLanguageModel, Processor]:
    """The model on meta, frozen where it is to be, and its processor.

    Raises:
        ConfigError: Parts that do not fit or are too large for torch, a model without a processor, or nothing to train.
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
    freeze_parts(model, config)
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


def freeze_parts(model: VisionLanguageModel, config: TrainConfig) -> None:
    """What the config freezes records no gradients.

    Raises:
        ConfigError: A part that is not there, or nothing is left to train.
    """
    if config.optimizer.freeze:
        freeze(model, config.optimizer.freeze, thaw=config.optimizer.thaw)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("OptimizerOptions.freeze: all parts are frozen, nothing is left to train")


def fingerprint(
    config: TrainConfig, model: VisionLanguageModel, processor: Processor, data: Conversations
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
        "data": data.fingerprint(),
        "seed": config.seed,
        "shuffle": config.data.shuffle,
    }
    found: dict[str, Any] = json.loads(json.dumps(values))
    return found


def build_model(config: TrainConfig, shapes: VisionLanguageModel, ranks: Ranks) -> VisionLanguageModel:
    """Collective. The model with weights on this rank's device: all of them, or the rank's share.

    Without a folder the weights are drawn from the config's seed, the same for any number of ranks.

    Raises:
        CheckpointError: The folder cannot be read.
        RankError: Ranks have other weights.
    """
    dtype, folder = getattr(torch, config.dtype), config.model.folder
    torch.manual_seed(config.seed)
    if config.ranks.sharding == "fsdp" and ranks.group is not None:
        from vlkit.training.sharding import load_sharded, make_mesh

        model = load_sharded(
            folder or shapes.config,
            make_mesh(replicate=config.ranks.replicate, expert_parallel=config.ranks.expert_parallel),
            dtype=dtype,
            param_dtype=None if config.compute_dtype is None else getattr(torch, config.compute_dtype),
            prepare=partial(freeze_parts, config=config),
        )
        model.published_dtypes = {}  # what was trained is saved in the dtype that it was trained in
    else:
        with ranks.together():
            if folder is not None:
                model = from_pretrained(folder, dtype=dtype, mapped=False)
            else:
                model = create_model(shapes.config, dtype=dtype, device="cpu")
            freeze_parts(model, config)
        sums = [repr(float(p.detach().double().sum())) for p in model.parameters()]
        ranks.check_equal({"sums of weights": sums}, "the ranks do not begin with the same weights")
        model.to(ranks.device)
    if config.activation_checkpointing != "none":
        checkpoint_blocks(model, every="selective" if config.activation_checkpointing == "selective" else 1)
    return model


def make_optimizer(model: VisionLanguageModel, config: TrainConfig, ranks: Ranks) -> Muon:
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
