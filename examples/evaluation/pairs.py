"""Pairs for dpo.toml: the right reading of a strip, and a wrong one that the model itself has drawn.

    python evaluation/pairs.py runs/sft/model           # in the folder of the examples

Every question of digits/seen and digits/unseen is answered once, at temperature 1; wrong answers are kept. What the model never
says teaches little: pairs with digits changed at random are told apart by the trained model already.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from readings import readings

import vlkit
from vlkit.processing import Processor
from vlkit.training.sources import open_source


def write_pairs(model_folder: Path, data: Path, *, seed: int = 0, name: str = "pairs.jsonl") -> int:
    """Write pairs beside the questions that they are made of.

    Returns:
        How many pairs there are.
    """
    model, processor = vlkit.from_pretrained(model_folder).eval(), Processor.from_pretrained(model_folder)
    questions = list(open_source(data / "questions.jsonl"))
    drawn = readings(model, processor, questions, temperature=1.0, seed=seed * len(questions))
    asked = (data / "questions.jsonl").read_text().splitlines()  # with paths as they are there
    lines = []
    for line, question, answer in zip(asked, questions, drawn, strict=True):
        if answer not in ("", question["answer"]):
            sides = {"chosen": question["answer"], "rejected": answer}
            pair = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
            lines.append(json.dumps({"messages": json.loads(line)["messages"], **pair}) + "\n")
    (data / name).write_text("".join(lines))
    return len(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in (Path("digits/seen"), Path("digits/unseen")):
        print(f"{folder}: {write_pairs(Path(sys.argv[1]), folder)} pairs")
