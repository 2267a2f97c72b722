"""Messages in few words, for the tests of what happens to samples."""

from __future__ import annotations

from typing import Any

import numpy as np


def image(name: Any = None) -> dict[str, Any]:
    return {"type": "image"} if name is None else {"type": "image", "image": name}


def says(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


DOCUMENT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        says("user", "first", image("a"), "second ", image(), image("a")),
        {"role": "assistant", "content": "yes"},
        says("user", image("c"), "and this?"),
    ],
    "images": ["b"],
}
"""Four images, one of them beside the messages."""
