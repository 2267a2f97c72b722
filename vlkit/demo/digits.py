"""Real handwritten digits, split by writer (UCI Optical Recognition of Handwritten Digits, CC BY 4.0; see data/README.md)."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

FIRST_UNSEEN = 1287  # a form begins here: the four forms from here on are never trained on


class Digits(NamedTuple):
    """Handwritten digits.

    Attributes:
        images: float32 [digits, 8, 8]; 0 is paper, 1 is full ink.
        labels: int64 [digits], 0 to 9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@cache
def load_digits(writers: Literal["seen", "unseen"]) -> Digits:
    """The digits of the writers to train on ("seen") or of the others ("unseen")."""
    with resources.files("vlkit.demo").joinpath("data/digits.npz").open("rb") as file, np.load(file) as stored:
        images, labels = stored["images"], stored["labels"]
    part = slice(None, FIRST_UNSEEN) if writers == "seen" else slice(FIRST_UNSEEN, None)
    return Digits(images[part].astype(np.float32) / 16, labels[part].astype(np.int64))
