"""How far a run is, and what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        steps: Steps done, those of earlier parts of the run included.
        tokens: Tokens that went through the decoder.
        loss: Of the last step, per what its objective counts (supervised tokens, pairs, ...); None if no step was done now.
        skipped_steps: Steps that changed nothing: gradients that were not finite, or nothing to learn.
        corrupt_samples: Samples left out because they cannot be used.
        checkpoint: The newest checkpoint.
        model: Folder of the saved model; None if the run was stopped before its end.
        stopped_by: The signal that stopped it; None at the end of the run.
    """

    steps: int
    tokens: int
    loss: float | None
    skipped_steps: int
    corrupt_samples: int
    checkpoint: Path | None
    model: Path | None
    stopped_by: str | None


class Done(NamedTuple):
    """One step, as all ranks know it.

    Attributes:
        loss: The mean of those of its updates.
        grad_norm: Of the last update.
        skipped: Whether it changed nothing.
        taught: Whether there was anything to learn.
        tokens: On all ranks.
        samples: Drawn, on all ranks.
        corrupt: Of these, left out.
    """

    loss: float
    grad_norm: float
    skipped: bool
    taught: bool
    tokens: int
    samples: int
    corrupt: int


@dataclass
class Progress:
    """What has to be known to go on."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    untaught_in_a_row: int = 0  # of these, the steps with nothing to learn
    samples_in_a_row: int = 0  # drawn in these
    corrupt_in_a_row: int = 0  # of these, left out
    corrupt_samples: int = 0
    stage: int = 0  # number of the stage, from 0
    stage_step: int = 0  # steps done in it

    def count(self, done: Done) -> None:
        """Take a step into account."""
        self.step += 1
        self.stage_step += 1
        self.samples += done.samples
        self.tokens += done.tokens
        self.corrupt_samples += done.corrupt
        self.skipped_steps += done.skipped
        if done.skipped:
            self.skipped_in_a_row += 1
            self.untaught_in_a_row += not done.taught
            self.samples_in_a_row += done.samples
            self.corrupt_in_a_row += done.corrupt
        else:
            self.skipped_in_a_row = self.untaught_in_a_row = self.samples_in_a_row = self.corrupt_in_a_row = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As it was saved; one from before there were stages is of the only stage."""
        known = {field.name for field in fields(cls)}
        return cls(**{"stage_step": values["step"], **{key: value for key, value in values.items() if key in known}})
