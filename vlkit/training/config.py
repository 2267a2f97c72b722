"""TrainConfig: a whole training run in one file, TOML or JSON, checked before anything is built.

    run = "runs/first"                 # where checkpoints, metrics and the model go
    steps = 1000
    batch = 64                         # samples per step, over all ranks

    [model]
    name = "kimi-vl-tiny"

    [data]
    files = ["train.jsonl"]

Paths are relative to the file. A field that does not exist is an error with the nearest name.

A run of several stages names them: each is the run's config in which some fields differ, see `vlkit.training.stages`.

    [[stages]]
    name = "align"
    train = ["projector"]

    [[stages]]
    name = "sft"
    steps = 5000
    optimizer = {lr = 2e-5}
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlkit.config import Config, Count, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.strict_json import read_json
from vlkit.training.lora import LoraOptions
from vlkit.training.options import (
    CheckpointOptions,
    DataSource,
    Dtype,
    Factor,
    ModelSource,
    OptimizerOptions,
    RankOptions,
    Schedule,
)
from vlkit.training.resolution import ResolutionSchedule
from vlkit.training.stages import absolute_stages, merge_stages

if TYPE_CHECKING:
    from vlkit.training.tasks import Make

__all__ = [
    "CheckpointOptions",
    "DataSource",
    "ModelSource",
    "OptimizerOptions",
    "RankOptions",
    "Schedule",
    "TrainConfig",
]


class TrainConfig(Config):
    """A training run.

    Attributes:
        run: Folder of checkpoints, metrics and, at the end, the model.
        model: What is trained.
        data: On what.
        steps: Length of the run in steps; or
        epochs: in rounds through the data.
        batch: Samples per step, over all ranks; 32 where neither this nor packs is given.
        packs: Packs of `data.pack_tokens` per step, over all ranks, instead of `batch` samples.
        micro_batch: Most samples of one forward on one rank; None takes all that the rank has.
        micro_batch_tokens: Most tokens of one forward on one rank, where more than one sample is in it.
        resolution: How many pixels an image may have, over the progress of the stage; None leaves it to the processor.
        objective: What is minimised: a table with "kind" and its options, see `vlkit.training.tasks`; None is next-token.
        train: What learns: parts of the model by the beginnings of parameter names, as in `vlkit.optim.freeze`; all else is
            frozen. None is all. `optimizer.freeze` and `thaw` are taken into account too; of all that fit a name, the one with
            most words decides.
        rope_theta: Base of the decoder's rotary wavelengths from here on; None leaves it.
        max_positions: With rope_theta: positions that the decoder accepts from here on.
        lora: Adapters that learn in the place of the parts that they are in. Other parts are frozen, unless `train` or
            `optimizer.thaw` names them. The saved model has the adapters merged, and they lie beside it in the folder `adapter`.
        optimizer: Rule of the update.
        schedule: Learning rate over the run.
        dtype: Of the parameters.
        compute_dtype: Of the products; None is that of the parameters. With dtype = "float32" it may be "bfloat16", by
            autocast or FSDP2. No other pair is possible: products are never wider than the parameters.
        activation_checkpointing: Recompute blocks in the backward: "none", "selective" (cheap parts only) or "full".
        balance_rate: Change per step of the selection bias of routers that have one, and are not frozen.
        balance_rule: "centred" keeps the mean of a layer's biases (Moonlight), "sign" does not (DeepSeek-V3).
        seed: Of weights, order and everything drawn.
        device: "auto" takes an accelerator where there is one.
        ranks: How ranks share the work.
        checkpoints: When the run is saved.
        log_every: Steps between lines of progress.
        tensorboard: Write event files too, into the folder `tensorboard` of the run.
        picture: Draw loss, learning rates, fill and experts into `picture.svg` of the run at its end; needs matplotlib, and a
            line says so where it is missing.
        max_skipped_steps: Steps in a row that change nothing, before the run stops: their gradients are not finite, or none of
            their samples has a supervised token.
        check_finite_every: Steps between looks at the output of every part of the model, which stop the run at the first that is
            not finite and name it; None never looks. See `vlkit.training.finite`.
        keep_state: In a stage behind another: take over the optimizer's state of the parameters that both train, by name;
            else it begins anew.
        stages: Tables with a name, and those fields of this config that are others in the stage.
    """

    run: str
    model: ModelSource
    data: DataSource
    steps: Size | None = None
    epochs: Positive | None = None
    batch: Size | None = None
    packs: Size | None = None
    micro_batch: Size | None = None
    micro_batch_tokens: Size | None = None
    resolution: ResolutionSchedule | None = None
    objective: Mapping[str, Any] | None = None
    train: tuple[str, ...] | None = None
    rope_theta: Positive | None = None
    max_positions: Size | None = None
    lora: LoraOptions | None = None
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: Schedule = Schedule()
    dtype: Dtype = "float32"
    compute_dtype: Dtype | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    balance_rate: Factor = 1e-3
    balance_rule: Literal["centred", "sign"] = "centred"
    seed: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: RankOptions = RankOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    log_every: Size = 10
    tensorboard: bool = False
    picture: bool = True
    max_skipped_steps: Size = 10
    check_finite_every: Size | None = None
    keep_state: bool = False
    stages: tuple[Mapping[str, Any], ...] = ()

    def check(self) -> None:
        for field, paths in (
            ("run", (self.run,)),
            ("model.folder", (self.model.folder,)),
            ("model.processor", (self.model.processor,)),
            ("data.files", self.data.paths),
        ):
            for path in paths:
                if path is not None and (not path.strip() or "\0" in path):
                    raise ConfigError(f"TrainConfig.{field}: expected a path, found {path!r}")
        if self.compute_dtype not in (None, self.dtype) and (self.dtype, self.compute_dtype) != ("float32", "bfloat16"):
            raise ConfigError(
                f"TrainConfig.compute_dtype: {self.compute_dtype!r} with dtype = {self.dtype!r} is not possible; "
                "compute_dtype = 'bfloat16' goes with dtype = 'float32', and without it products have the dtype of the parameters"
            )
        if self.max_positions is not None and self.rope_theta is None:
            raise ConfigError("TrainConfig.max_positions: more positions go with another rope_theta; set both")
        if self.train is not None and not self.train:
            raise ConfigError("TrainConfig.train: nothing is named, nothing is left to train")
        if self.lora is not None and self.ranks.sharding == "fsdp":
            raise ConfigError("TrainConfig.lora: adapters are not sharded; set ranks.sharding = 'zero1'")
        if self.packs is not None and self.data.pack_tokens is None:
            raise ConfigError("TrainConfig.packs: packs of how many tokens? set data.pack_tokens")
        if self.packs is not None and self.batch is not None:
            raise ConfigError("TrainConfig.batch: a step is either batch samples or packs packs; give one of the two")
        for field in ("micro_batch", "micro_batch_tokens"):
            if getattr(self, field) and (self.packs or (self.data.pack_tokens and field == "micro_batch_tokens")):
                raise ConfigError(
                    f"TrainConfig.{field}: data.pack_tokens already says what one forward takes; leave {field} away"
                )
        self._check_objective()
        if self.stages:
            self.resolved_stages()  # checks each of them
        else:
            self._check_length()

    def _check_objective(self) -> None:
        """Refuse what the objective would not look at."""
        if self.objective is None:
            return
        _, task = self.task
        kind, data = self.objective["kind"], self.data
        forwards = {
            "micro_batch": self.micro_batch,
            "micro_batch_tokens": self.micro_batch_tokens,
            "data.pack_tokens": None if self.packs else data.pack_tokens,
        }
        for field, value in forwards.items():
            if value is not None and getattr(task, "one_pack", False):
                raise ConfigError(
                    f"TrainConfig.{field}: {kind} takes all samples of a rank in one forward, because it compares them with each "
                    f"other; leave {field} away, and choose batch"
                )
        if data.join_groundings and kind != "next-token":
            raise ConfigError(
                f"TrainConfig.data.join_groundings: samples of {kind} are no conversations that could be joined; leave it away"
            )
        if data.images_first and kind == "contrast":
            raise ConfigError(
                "TrainConfig.data.images_first: contrast shows the image first in any case; leave it away"
            )

    def _check_length(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("TrainConfig: give either steps or epochs")
        if self.epochs is not None and (self.packs is not None or self.data.streams):
            raise ConfigError(
                "TrainConfig.epochs: how many steps an epoch of packs or streams has is not known; give steps"
            )
        if self.steps is not None:
            self.schedule.steps(self.steps)

    def resolved_stages(self) -> list[tuple[str, TrainConfig]]:
        """Name and whole config of every stage, in order; a run without stages is one without a name.

        Raises:
            ConfigError: A stage that is none, with its name.
        """
        if not self.stages:
            if self.keep_state:
                raise ConfigError(
                    "TrainConfig.keep_state: a run without stages has none before it whose state could be kept"
                )
            return [("", self)]
        found = []
        for name, values in merge_stages(self.to_dict()):
            try:
                found.append((name, TrainConfig.from_dict(values)))
            except ConfigError as error:
                raise ConfigError(f"stage {name!r}: {error}") from error
        if found[0][1].keep_state:
            raise ConfigError(f"stage {found[0][0]!r}: keep_state: no stage is before it whose state could be kept")
        return found

    @property
    def samples_per_step(self) -> int | None:
        """Over all ranks; None where steps are of packs."""
        return None if self.packs else self.batch or 32

    @cached_property
    def task(self) -> tuple[Config, Make]:
        """Options of the objective, and the task that they are of."""
        from vlkit.training.tasks import read_objective

        return read_objective({"kind": "next-token"} if self.objective is None else self.objective)


def read_train_config(path: Path | str) -> TrainConfig:
    """The config in a TOML or JSON file; its paths become absolute, seen from the file's folder.

    Raises:
        ConfigError: Not such a file, an unknown field, a bad value; with the path.
    """
    path = Path(path)
    if path.suffix == ".json":
        values: Any = read_json(path)
    elif path.suffix == ".toml":
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
    else:
        raise ConfigError(f"{path}: a config is a .toml or a .json file")
    try:
        return absolute_paths(TrainConfig.from_dict(values), path.resolve().parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def absolute_paths(config: TrainConfig, base: Path) -> TrainConfig:
    """The config with its paths seen from a folder."""

    def there(path: str | None) -> str | None:
        return None if path is None else str(base / Path(path).expanduser())

    model = config.model.replace(folder=there(config.model.folder), processor=there(config.model.processor))

    def all_there(paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(str(base / Path(path).expanduser()) for path in paths)

    streams = tuple(stream.replace(files=all_there(stream.files)) for stream in config.data.streams)
    data = config.data.replace(files=all_there(config.data.files), streams=streams)
    stages = absolute_stages(config.stages, all_there)
    return config.replace(run=there(config.run), model=model, data=data, stages=stages)
