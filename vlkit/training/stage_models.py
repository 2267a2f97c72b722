"""The model of a run from stage to stage: how it is built, what a stage begins with, what it is compared with, where it is saved.

    config -> model -> stage 1 -> stages/1-<name> -> stage 2 -> stages/2-<name> -> ... -> model
                         ^ reference: as built            ^ reference: stages/1-<name>

Where parts are sharded, the model is read again between stages, because what records gradients is settled before.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlkit.errors import CheckpointError, ConfigError
from vlkit.models import VisionLanguageModel
from vlkit.processing import Processor
from vlkit.training.build import build_model, enter_stage, fingerprint, freeze_parts
from vlkit.training.config import TrainConfig
from vlkit.training.lora import has_lora, merge_lora
from vlkit.training.lora_files import save_adapter
from vlkit.training.ranks import Ranks
from vlkit.training.rope_theta import set_rope_theta
from vlkit.training.run_stages import Stage

STAGES, MODEL, ADAPTER = "stages", "model", "adapter"


class StageModels:
    """Builds and saves the model of a run.

    Args:
        config: Of the run.
        stages: All of them.
        shapes: The model on meta, as the config describes it.
        processor: Of the model; saved with it.
        ranks: That run it.
    """

    def __init__(
        self,
        config: TrainConfig,
        stages: Sequence[Stage],
        shapes: VisionLanguageModel,
        processor: Processor,
        ranks: Ranks,
    ) -> None:
        self.config, self.stages, self.shapes, self.processor, self.ranks = config, stages, shapes, processor, ranks

    def fingerprint(self, stage: Stage) -> dict[str, Any]:
        """What has to stay the same, of a stage."""
        return fingerprint(stage.config, self.described(stage), self.processor, stage.sources)

    def described(self, stage: Stage) -> VisionLanguageModel:
        """The model of a stage on meta, as an own copy.

        Raises:
            ConfigError: Names of parts that are not there, or another rope_theta where there is none.
        """
        shapes = copy.deepcopy(self.shapes)
        try:
            self._as_in(shapes, stage)
        except ConfigError as error:
            raise ConfigError(f"stage {stage.name!r}: {error}" if stage.name else str(error)) from error
        return shapes

    def build(self, stage: Stage) -> VisionLanguageModel:
        """Collective. New weights for a stage, or a place for those of a checkpoint."""
        model = build_model(self.config, self.shapes, self.ranks, prepare=lambda model: self._as_in(model, stage))
        enter_stage(model, stage.config)
        return model

    def next(self, model: VisionLanguageModel, stage: Stage) -> VisionLanguageModel:
        """Collective. The model that the stage before left, as the stage wants it."""
        if model.parts_are_sharded:
            model = build_model(
                self.config,
                self.shapes,
                self.ranks,
                folder=self.folder(self.stages[stage.number - 1]),
                prepare=lambda model: freeze_parts(model, stage.config),
            )
        enter_stage(model, stage.config)
        return model

    def take_modules(self, modules: Any, stage: Stage) -> str | None:
        """Collective. Give the modules of a stage's objective the weights that the last stage of this objective ended with.

        Returns:
            What to say where they begin anew, though there was such a stage: their sizes are others.

        Raises:
            CheckpointError: What it ended with was saved, and cannot be read.
        """
        kind = kind_of(stage)
        before = next((each for each in reversed(self.stages[: stage.number]) if kind_of(each) == kind), None)
        if before is None:
            return None
        folder = self.folder(before) / kind
        with self.ranks.together(), random_states_kept():
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: missing, and stage {stage.name!r} goes on with what its objective trained in stage "
                    f"{before.name!r}; put it back, or begin anew in another folder with `run`"
                )
            found = type(modules).from_pretrained(folder)
            if found.config != modules.config:
                return (
                    f"what its objective {kind!r} trains beside the model begins anew, because it has other sizes than in "
                    f"stage {before.name!r}"
                )
            modules.load_state_dict(found.state_dict())
        return None

    def reference(self, stage: Stage) -> Callable[[], VisionLanguageModel]:
        """Collective when it is first called. Gives the frozen model that a stage began with, always the same one."""
        made: list[VisionLanguageModel] = []

        def give() -> VisionLanguageModel:
            if not made:
                made.append(self._reference(stage))
            return made[0]

        return give

    def _reference(self, stage: Stage) -> VisionLanguageModel:
        folder = None
        if stage.number:
            folder = self.folder(self.stages[stage.number - 1])
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder}: missing, and stage {stage.name!r} compares with the model that was saved there"
                )

        def frozen(model: VisionLanguageModel) -> None:
            self._set_theta(model, stage)
            model.requires_grad_(False)

        with random_states_kept():  # a resumed run builds it in another step
            return build_model(
                self.config, self.shapes, self.ranks, folder=folder, adapted=False, prepare=frozen
            ).eval()

    def _as_in(self, model: VisionLanguageModel, stage: Stage) -> None:
        self._set_theta(model, stage)
        freeze_parts(model, stage.config)

    def _set_theta(self, model: VisionLanguageModel, stage: Stage) -> None:
        """The wavelengths that the stages up to this one have set."""
        for each in self.stages[: stage.number + 1]:
            if each.config.rope_theta is not None:
                set_rope_theta(model, each.config.rope_theta, max_positions=each.config.max_positions)

    # Files

    def folder(self, stage: Stage) -> Path:
        """Where the model that a stage ends with is saved."""
        return Path(self.config.run) / STAGES / f"{stage.number + 1}-{stage.name}"

    def save_stage(self, model: VisionLanguageModel, modules: nn.Module | None, stage: Stage) -> Path:
        """Collective. Save what a stage ends with, whole or not at all."""
        folder = self.folder(stage)
        partial = folder.with_name(f".{folder.name}.partial")
        with self.ranks.together():
            if self.ranks.first:
                folder.parent.mkdir(exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
        self.save(model, modules, stage, partial)
        with self.ranks.together():
            if self.ranks.first:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(partial, folder)
        return folder

    def save(self, model: VisionLanguageModel, modules: nn.Module | None, stage: Stage, folder: Path) -> Path:
        """Collective. Write the model in its Hub layout, with its processor: `vlkit generate` takes the folder.

        Adapters are merged, and lie in the folder `adapter` of it too; modules of the objective lie in one of its kind.
        """
        if model.parts_are_sharded:
            from vlkit.training.gathering import save_sharded

            save_sharded(model, folder)
        with self.ranks.together():
            if self.ranks.first:
                if has_lora(model):
                    save_adapter(model, folder / ADAPTER)
                    model = copy.deepcopy(model)
                    merge_lora(model)
                if not model.parts_are_sharded:
                    model.save_pretrained(folder)
                self.processor.save_pretrained(folder)
                save = getattr(modules, "save_pretrained", None)
                if save is not None:
                    save(folder / kind_of(stage))
        return folder


def what_trains(model: nn.Module) -> str:
    """For people: how much of every part learns."""
    told = []
    for name, part in model.named_children():
        parameters = list(part.parameters())
        trained, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
        how = "frozen" if not trained else "trains" if trained == total else f"trains {trained:,}"
        told.append(f"{name} {how} of {total:,}")
    return ", ".join(told)


def kind_of(stage: Stage) -> str:
    """Of the stage's objective."""
    return str((stage.config.objective or {}).get("kind"))


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random states of the process as they were."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
