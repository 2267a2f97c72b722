"""TrainConfig: a whole training run in one file, TOML or JSON, checked before anything is built.

    run = "runs/first"                 # where checkpoints, metrics and the model go
    steps = 1000
    batch = 64                         # samples per step, over all ranks

    [model]
    name = "kimi-vl-tiny"

    [data]
    files = ["train.jsonl"]

Paths are relative to the file. A field that does not exist is an error with the nearest name.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from vlkit.config import AtLeast, AtMost, Config, Count, Positive, Size
from vlkit.errors import ConfigError
from vlkit.hub.strict_json import read_json

PARTS = ("vision", "projector", "llm")
Share = Annotated[float, AtLeast(0.0), AtMost(1.0)]
"""A real number between 0 and 1."""
Factor = Annotated[float, AtLeast(0.0)]
"""A real number of at least 0."""
Dtype = Literal["float32", "bfloat16", "float64"]


class ModelSource(Config):
    """Which model is trained: exactly one of `name`, `folder` and the pair `vision`, `llm`.

    Attributes:
        name: A registered model, with freshly drawn weights.
        folder: A saved model in a family's Hub layout, or in vlkit's; its processor lies beside it.
        vision: A registered tower, or its fields with "type".
        projector: The same; its widths are fitted to its neighbours.
        llm: The same for a decoder.
        overrides: With `name`: fields of the model's config to change, as in `vlkit.create_model`.
        processor: A folder with a processor, where the model brings none: its vocabulary comes from files.
    """

    name: str | None = None
    folder: str | None = None
    vision: str | Mapping[str, Any] | None = None
    projector: str | Mapping[str, Any] | None = None
    llm: str | Mapping[str, Any] | None = None
    overrides: Mapping[str, Any] | None = None
    processor: str | None = None

    def check(self) -> None:
        for part in PARTS:
            value = getattr(self, part)
            if value is not None and not isinstance(value, str | Mapping):
                raise ConfigError(f"ModelSource.{part}: expected a registered name or fields, found {value!r}")
        if self.overrides is not None and not isinstance(self.overrides, Mapping):
            raise ConfigError(f"ModelSource.overrides: expected fields of the model's config, found {self.overrides!r}")
        composed = any(getattr(self, part) is not None for part in PARTS)
        if (self.name is not None) + (self.folder is not None) + composed != 1:
            raise ConfigError("ModelSource: give one of name, folder, or vision and llm")
        if composed and (self.vision is None or self.llm is None):
            raise ConfigError("ModelSource: a composition needs vision and llm")
        if self.overrides and self.name is None:
            raise ConfigError("ModelSource.overrides change a registered model: they go with name")


class DataSource(Config):
    """What is learnt from: lines of JSON, one conversation each.

        {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "a cat"}]}

    Attributes:
        files: JSON lines. Images lie in the file's own folder or below; their paths are relative to it.
        shuffle: Draw a new order for every epoch; else the order of the files.
        corrupt: What happens to a sample that cannot be used: stop with its file and line, or leave it out and count it.
        max_tokens: A sample with more tokens counts as corrupt; None takes the decoder's positions, which are the limit in any
            case.
        workers: Threads that prepare the next step's samples meanwhile; 0 prepares them in between.
    """

    files: tuple[str, ...]
    shuffle: bool = True
    corrupt: Literal["refuse", "skip"] = "refuse"
    max_tokens: Size | None = None
    workers: Count = 1

    def check(self) -> None:
        if not self.files:
            raise ConfigError("DataSource.files: no files")


class OptimizerOptions(Config):
    """The rule of the update; see `vlkit.optim.Muon`.

    Attributes:
        kind: "muon" for matrices, with AdamW inside for the rest; or "adamw" for all.
        lr: Highest learning rate.
        weight_decay: Decoupled, multiplied by the learning rate alone.
        momentum: Of Muon.
        adjust_lr: How Muon scales an update by its shape.
        ns: Coefficients of the Newton-Schulz steps, by name.
        betas: Of AdamW.
        adam_eps: Of AdamW.
        vector_rate: AdamW's learning rate inside Muon, relative to lr.
        part_lr: Learning rates of parts of the model by their names, such as "vision" or "llm.blocks"; the rest learns at lr.
        layer_decay: For parts with a stack of blocks, the factor from each block to the one before it; the last block learns at
            the part's rate of part_lr, or at lr.
        freeze: Parts that do not learn.
        thaw: Parts of those that do.
        splits: "heads" cuts the projections of attentions into heads before they are orthogonalised.
        decay_vectors: Whether weight decay reaches gains and biases.
        muon: Patterns of parameter names that go to Muon whatever they are.
        adamw: The same for AdamW.
        partition: How the state is divided between ranks: "flat" in equal ranges of elements, "matrix" by whole matrices.
        max_grad_norm: Clip the norm over all gradients to this.
    """

    kind: Literal["muon", "adamw"] = "muon"
    lr: Positive = 2e-4
    weight_decay: Factor = 0.1
    momentum: Share = 0.95
    adjust_lr: Literal["match_rms_adamw", "original", "spectral_unclamped", "none"] = "match_rms_adamw"
    ns: str = "polar_express"
    betas: tuple[Share, Share] = (0.9, 0.95)
    adam_eps: Positive = 1e-8
    vector_rate: Positive = 1.0
    part_lr: Mapping[str, float] | None = None
    layer_decay: Mapping[str, float] | None = None
    freeze: tuple[str, ...] = ()
    thaw: tuple[str, ...] = ()
    splits: Literal["declared", "heads"] = "declared"
    decay_vectors: bool = True
    muon: tuple[str, ...] = ()
    adamw: tuple[str, ...] = ()
    partition: Literal["flat", "matrix"] = "flat"
    max_grad_norm: Positive | None = 1.0

    def check(self) -> None:
        for field in ("part_lr", "layer_decay"):
            given = getattr(self, field)
            if given is not None and not isinstance(given, Mapping):
                raise ConfigError(f"OptimizerOptions.{field}: expected a table of parts, found {given!r}")
            for part, value in (given or {}).items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise ConfigError(f"OptimizerOptions.{field}.{part}: expected a number above 0, found {value!r}")
        if self.kind == "adamw" and (self.muon or self.adamw):
            raise ConfigError(
                "OptimizerOptions: patterns of names choose between Muon and AdamW; they need kind = 'muon'"
            )


class Schedule(Config):
    """The learning rate over the run; see `vlkit.optim.warmup_decay`.

    Attributes:
        warmup: Steps of the rise.
        decay: Steps of the fall at the end; by default all that follow the rise.
        shape: Of the fall.
        final: Factor at the end.
    """

    warmup: Count = 0
    decay: Count | None = None
    shape: Literal["cosine", "linear"] = "cosine"
    final: Share = 0.0


class RankOptions(Config):
    """How ranks share the work.

    Attributes:
        sharding: "zero1": every rank has the whole model, the optimizer's state is divided. "fsdp": weights and
            gradients are divided too.
        expert_parallel: Ranks among which the experts of a layer are divided; with "fsdp".
        replicate: Copies of the sharded model; with "fsdp".
        timeout_minutes: How long a rank waits for the others before it gives up.
        heartbeat_seconds: A step that takes longer says so, again and again, and what it is doing.
    """

    sharding: Literal["zero1", "fsdp"] = "zero1"
    expert_parallel: Size = 1
    replicate: Size = 1
    timeout_minutes: Annotated[Positive, AtMost(1e6)] = 10.0
    heartbeat_seconds: Positive = 60.0

    def check(self) -> None:
        if self.sharding == "zero1" and (self.expert_parallel > 1 or self.replicate > 1):
            raise ConfigError("RankOptions: expert_parallel and replicate need sharding = 'fsdp'")


class CheckpointOptions(Config):
    """When the run is saved.

    Attributes:
        every: Steps between saves; None saves at the end and when the run is asked to stop.
        keep: How many of the newest stay.
    """

    every: Size | None = None
    keep: Size = 2


class TrainConfig(Config):
    """A training run.

    Attributes:
        run: Folder of checkpoints, metrics and, at the end, the model.
        model: What is trained.
        data: On what.
        steps: Length of the run in steps; or
        epochs: in rounds through the data.
        batch: Samples per step, over all ranks.
        micro_batch: Most samples of one forward on one rank; None takes all that the rank has.
        micro_batch_tokens: Most tokens of one forward on one rank, where more than one sample is in it.
        optimizer: Rule of the update.
        schedule: Learning rate over the run.
        dtype: Of the parameters.
        compute_dtype: Of the products; None is that of the parameters. With dtype = "float32" it may be "bfloat16", by
            autocast or FSDP2. No other pair is possible: products are never wider than the parameters.
        activation_checkpointing: Recompute blocks in the backward: "none", "selective" (cheap parts only) or "full".
        balance_rate: Change per step of the selection bias of routers that have one.
        seed: Of weights, order and everything drawn.
        device: "auto" takes an accelerator where there is one.
        ranks: How ranks share the work.
        checkpoints: When the run is saved.
        log_every: Steps between lines of progress.
        max_skipped_steps: Steps in a row that change nothing, before the run stops: their gradients are not finite, or none of
            their samples has a supervised token.
        check_finite_every: Steps between looks at the output of every part of the model, which stop the run at the first that is
            not finite and name it; None never looks. See `vlkit.training.finite`.
    """

    run: str
    model: ModelSource
    data: DataSource
    steps: Size | None = None
    epochs: Positive | None = None
    batch: Size = 32
    micro_batch: Size | None = None
    micro_batch_tokens: Size | None = None
    optimizer: OptimizerOptions = OptimizerOptions()
    schedule: Schedule = Schedule()
    dtype: Dtype = "float32"
    compute_dtype: Dtype | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    balance_rate: Factor = 1e-3
    seed: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    ranks: RankOptions = RankOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    log_every: Size = 10
    max_skipped_steps: Size = 10
    check_finite_every: Size | None = None

    def check(self) -> None:
        for field, paths in (
            ("run", (self.run,)),
            ("model.folder", (self.model.folder,)),
            ("model.processor", (self.model.processor,)),
            ("data.files", self.data.files),
        ):
            for path in paths:
                if path is not None and (not path.strip() or "\0" in path):
                    raise ConfigError(f"TrainConfig.{field}: expected a path, found {path!r}")
        if self.compute_dtype not in (None, self.dtype) and (self.dtype, self.compute_dtype) != ("float32", "bfloat16"):
            raise ConfigError(
                f"TrainConfig.compute_dtype: {self.compute_dtype!r} with dtype = {self.dtype!r} is not possible; "
                "compute_dtype = 'bfloat16' goes with dtype = 'float32', and without it products have the dtype of the parameters"
            )
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("TrainConfig: give either steps or epochs")
        steps, schedule = self.steps, self.schedule
        if steps is not None and schedule.warmup + (schedule.decay or 0) > steps:
            raise ConfigError(
                f"TrainConfig.schedule: warmup={schedule.warmup} and decay={schedule.decay} do not fit into steps={steps}"
            )


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
    data = config.data.replace(files=tuple(str(there(name)) for name in config.data.files))
    return config.replace(run=there(config.run), model=model, data=data)
