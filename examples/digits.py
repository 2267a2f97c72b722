"""Conversations about real handwritten digits, for `vlkit train train.toml`: images and a file of JSON lines.

cd examples
python digits.py                                              # writes digits/
vlkit train train.toml                                        # or torchrun --nproc-per-node 2 -m vlkit train train.toml
vlkit generate runs/digits/model --image digits/unseen/0.png --prompt "Which digits?"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from PIL import Image

from vlkit.demo.digits import load_digits
from vlkit.demo.strips import AS_WRITTEN, Variation, make_strips


def write(folder: Path, writers: Literal["seen", "unseen"], count: int) -> None:
    """Strips of one to three digits, and what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    variation = Variation() if writers == "seen" else AS_WRITTEN
    strips = make_strips(load_digits(writers), count, seed=0, variation=variation, max_digits=3)
    with (folder / "conversations.jsonl").open("w") as file:
        for number, strip in enumerate(strips):
            Image.fromarray(strip.pixels).save(folder / f"{number}.png")
            question = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "Which digits?"}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": strip.text}]
            file.write(json.dumps({"messages": messages}) + "\n")


small = "--small" in sys.argv
write(Path("digits/seen"), "seen", 20 if small else 8000)
write(Path("digits/unseen"), "unseen", 5 if small else 100)
