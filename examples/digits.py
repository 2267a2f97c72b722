"""Data about real handwritten digits for the examples: images, and files of JSON lines that say what they show.

cd examples
python digits.py                                              # writes digits/
vlkit train train.toml                                        # or torchrun --nproc-per-node 2 -m vlkit train train.toml
vlkit generate runs/digits/model --image digits/unseen/0.png --prompt "Which digits?"

digits/seen is to learn from, digits/unseen are writers that no training sees. Both have

    conversations.jsonl    a question and its answer            train.toml, sft.toml
    questions.jsonl        the question, and the answer apart   grpo.toml, mirror_descent.toml
    captions.jsonl         an image and its text                contrast.toml

digits/processor is a processor that normalises pixels as strips need it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vlkit.demo.digits import load_digits
from vlkit.demo.strips import AS_WRITTEN, Variation, make_strips
from vlkit.demo.task import image_rule
from vlkit.processing import Processor, ProcessorConfig


def write(folder: Path, writers: Literal["seen", "unseen"], count: int) -> None:
    """Strips of one to three digits, and what they say; and strips of three to five as captions."""
    for name, digits in (("", (1, 3)), ("long-", (3, 5))):
        folder.mkdir(parents=True, exist_ok=True)
        variation = Variation() if writers == "seen" else AS_WRITTEN
        least, most = digits
        strips = make_strips(
            load_digits(writers), count, seed=0, variation=variation, min_digits=least, max_digits=most
        )
        images = [f"{name}{number}.png" for number in range(count)]
        for image, strip in zip(images, strips, strict=True):
            Image.fromarray(strip.pixels).save(folder / image)
        texts = [strip.text for strip in strips]
        if name:
            write_lines(
                folder / "captions.jsonl", ({"image": i, "text": t} for i, t in zip(images, texts, strict=True))
            )
            continue
        asked = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Which digits?"}]}
            for image in images
        ]
        both = list(zip(asked, texts, strict=True))
        answers = ({"messages": [q, {"role": "assistant", "content": text}]} for q, text in both)
        write_lines(folder / "conversations.jsonl", answers)
        write_lines(folder / "questions.jsonl", ({"messages": [q], "answer": text} for q, text in both))


def write_lines(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in samples)


small = "--small" in sys.argv
write(Path("digits/seen"), "seen", 20 if small else 8000)
write(Path("digits/unseen"), "unseen", 5 if small else 400)
Processor(ProcessorConfig(image=image_rule(patch_size=8, merge_size=2))).save_pretrained("digits/processor")
