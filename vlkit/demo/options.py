"""What a person can choose. Nothing heavy is imported here: the command line reads its defaults from this file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices of one demo.

    Attributes:
        seconds: How long to train.
        optimizer: Rule for the hidden matrices.
        lr: Highest learning rate; None means what suits the optimizer.
        seed: Of weights and data.
        vision: Name of a registered tower; None means a small MoonViT.
        projector: Name of a registered projector; None means a small pixel shuffle.
        llm: Name of a registered decoder; None means a small Moonlight with experts.
        batch: Strips per step.
        workers: Processes that learn together; 0 means two where two can run at once.
        threads: CPU threads of each process.
        out: Folder of the model and the page.
    """

    seconds: float = 140.0
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float | None = None
    seed: int = 0
    vision: str | None = None
    projector: str | None = None
    llm: str | None = None
    batch: int = 128
    workers: int = 0
    threads: int = 1
    out: Path = Path("vlkit-demo")
