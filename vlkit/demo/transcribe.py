"""Read pictures with a saved model, in a process of its own: `python -m vlkit.demo.transcribe MODEL PICTURES OUTPUT`.

Nothing reaches this process but files: what it reads was learnt, saved and loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import vlkit
from vlkit.demo.task import conversation, read


def transcribe(model_folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """Answers to all pictures, and how many tokens of pictures and prompts each expert received.

    Returns:
        {"answers": [text, ...], "load": [[tokens per expert, ...], ...]}, one row per MoE layer.
    """
    model = vlkit.from_pretrained(model_folder).eval()
    processor = vlkit.Processor.from_pretrained(model_folder)
    answers = read(model, processor, pictures)
    with torch.no_grad():
        load = model(processor([conversation(path) for path in pictures])).expert_load
    return {"answers": answers, "load": [] if load is None else load.tolist()}


if __name__ == "__main__":
    folder, of_pictures, output = map(Path, sys.argv[1:])
    result = transcribe(folder, sorted(of_pictures.glob("*.png")))
    output.write_text(json.dumps(result), encoding="utf-8")
