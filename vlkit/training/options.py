"""The tables of a training run's config: what is trained, on what, by which rule, at which rates, on which ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from vlkit.config import AtLeast, AtMost, Config, Count, Positive, Size
from vlkit.errors import ConfigError
from vlkit.processing.labels import LabelRule

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


class Stream(Config):
    """One of several kinds of data that a run mixes.

    Attributes:
        name: For people, and for figures.
        files: As `DataSource.files`.
        share: Of the tokens, relative to the other streams: a number, or points (progress of the stage from 0 to 1, share)
            between which it changes linearly.
    """

    name: str
    files: tuple[str, ...]
    share: float | tuple[tuple[float, float], ...] = 1.0

    def check(self) -> None:
        if not self.name.strip():
            raise ConfigError(f"Stream.name: expected a name, found {self.name!r}")
        if not self.files:
            raise ConfigError(f"Stream.files: no files in stream {self.name!r}")
        points = ((0.0, self.share),) if isinstance(self.share, float) else self.share
        places = [progress for progress, _ in points]
        if not points or places != sorted(set(places)) or not 0 <= places[0] <= places[-1] <= 1:
            raise ConfigError(f"Stream.share: expected points of rising progress from 0 to 1, found {self.share!r}")
        if min(share for _, share in points) < 0 or max(share for _, share in points) == 0:
            raise ConfigError(f"Stream.share: a share is at least 0 and not always 0, found {self.share!r}")


class DataSource(Config):
    """What is learnt from: lines of JSON, one conversation each.

        {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "?"}]},
                      {"role": "assistant", "content": "a cat"}]}

    Attributes:
        files: JSON lines. Images lie in the file's own folder or below; their paths are relative to it.
        streams: Several kinds of data that are mixed by shares of tokens, instead of `files`.
        shuffle: Draw a new order for every epoch; else the order of the files.
        draws: "epochs": every sample once per epoch. "curriculum": from easy to hard, by the "difficulty" of the samples.
            "prioritised": those more often that the model fails at, as an objective with verified answers finds out.
        curriculum: With that: the share of the samples that is open at first, and the progress at which all are; by default
            0.2 and 0.8.
        corrupt: What happens to a sample that cannot be used: stop with its file and line, or leave it out and count it.
        max_tokens: A sample with more tokens is too long; None takes the decoder's positions, which are the limit in any case.
        too_long: What happens to such a sample: it counts as one that cannot be used, it is left out and counted in any case,
            or it is cut at its end, before an image rather than in it.
        labels: What is learnt of a conversation.
        join_groundings: Questions about one image become one conversation of at most `max_tokens` tokens, which shows it once.
        images_first: How often the images of a conversation are moved to its front, with their numbers left in the text; from 0
            to 1. See `vlkit.training.transforms`.
        pack_tokens: Samples are packed into rows of at most so many tokens, each row one forward.
        pack_patches: The same for patches of images.
        workers: Threads that prepare the next step's samples meanwhile; 0 prepares them in between.
    """

    files: tuple[str, ...] = ()
    streams: tuple[Stream, ...] = ()
    shuffle: bool = True
    draws: Literal["epochs", "curriculum", "prioritised"] = "epochs"
    curriculum: tuple[Share, Share] | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"
    max_tokens: Size | None = None
    too_long: Literal["refuse", "skip", "cut"] = "refuse"
    labels: LabelRule = LabelRule()
    join_groundings: bool = False
    images_first: Share = 0.0
    pack_tokens: Size | None = None
    pack_patches: Size | None = None
    workers: Count = 1

    def check(self) -> None:
        if self.files and self.streams:
            raise ConfigError("DataSource: give either files or streams")
        if not self.files and not self.streams:
            raise ConfigError("DataSource.files: no files")
        if self.curriculum is not None and self.draws != "curriculum":
            raise ConfigError("DataSource.curriculum goes with draws = 'curriculum'")
        if self.draws != "epochs" and any(stream.share != 1.0 for stream in self.streams):
            raise ConfigError(f"DataSource.streams: with draws = {self.draws!r} streams have no shares")
        names = [stream.name for stream in self.streams]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"DataSource.streams: two streams are called {name!r}")
        if self.join_groundings and self.max_tokens is None:
            raise ConfigError("DataSource.join_groundings: conversations are joined up to max_tokens; set it")
        if self.pack_patches is not None and self.pack_tokens is None:
            raise ConfigError("DataSource.pack_patches: packs are limited by tokens too; set pack_tokens")

    @property
    def paths(self) -> tuple[str, ...]:
        """All files, those of streams one after another."""
        return self.files + tuple(path for stream in self.streams for path in stream.files)


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
        layer_decay: For parts with a stack of blocks, the factor from each block to the one before it; what comes after them
            learns at the part's rate of part_lr, or at lr, and the last block at the factor times that.
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
        warmup: Steps of the rise; a number with a point is a share of all steps, rounded up.
        decay: The same of the fall at the end; by default all steps that follow the rise.
        shape: Of the fall.
        final: Factor at the end.
    """

    warmup: Count | Share = 0
    decay: Count | Share | None = None
    shape: Literal["cosine", "linear"] = "cosine"
    final: Share = 0.0

    def steps(self, total: int) -> tuple[int, int | None]:
        """Steps of the rise and of the fall, in a run of so many.

        Raises:
            ConfigError: They do not fit.
        """

        def whole(length: float) -> int:
            return length if isinstance(length, int) else math.ceil(length * total - 1e-9)

        warmup, decay = whole(self.warmup), None if self.decay is None else whole(self.decay)
        if warmup + (decay or 0) > total:
            raise ConfigError(
                f"TrainConfig.schedule: warmup={self.warmup} and decay={self.decay} do not fit into steps={total}"
            )
        return warmup, decay


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
