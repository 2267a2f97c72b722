"""How well models read strips by writers that they have never seen.

    python evaluation/readings.py runs/sft/model runs/dpo/model          # in the folder of the examples

exact       share of strips whose reading, the likeliest token after another, is right
drawn       the same of readings drawn at temperature 1, four for every strip: what reinforcement learning raises
preferred   share of pairs in digits/unseen/pairs.jsonl whose right reading is likelier than the wrong one; see pairs.py
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vlkit
from vlkit.models import VisionLanguageModel
from vlkit.objectives import next_token_targets, segment_sum, token_log_probs
from vlkit.processing import Processor
from vlkit.training.sources import open_source

AT_ONCE = 100  # samples in one pack


def readings(
    model: VisionLanguageModel,
    processor: Processor,
    questions: Sequence[dict[str, Any]],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """An answer to every question, the likeliest tokens or, with a temperature, drawn."""
    answers = []
    for start in range(0, len(questions), AT_ONCE):
        batch = processor([each["messages"] for each in questions[start : start + AT_ONCE]])
        drawn = model.generate(
            batch,
            max_new_tokens=8,
            temperature=temperature,
            stop=processor.stop_ids,
            seed=[seed + start + place for place in range(batch.ids.layout.num_items)],
        )
        answers += [processor.decode(ids) for ids in drawn]
    return answers


@torch.no_grad()
def log_probs(
    model: VisionLanguageModel, processor: Processor, conversations: Sequence[list[dict[str, Any]]]
) -> torch.Tensor:
    """Log-probability of the answer of every conversation."""
    found = []
    for start in range(0, len(conversations), AT_ONCE):
        batch = processor(conversations[start : start + AT_ONCE], labels=True)
        targets = next_token_targets(batch.labels, batch.ids.layout)
        hidden = model.decode(batch).hidden.tokens
        found.append(segment_sum(token_log_probs(hidden, model.llm.head_weight, targets), batch.ids.layout))
    return torch.cat(found)


def share_right(answers: Sequence[str], questions: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(answer == question["answer"] for answer, question in zip(answers, questions, strict=True))


def evaluate(folder: Path, data: Path, pairs: str = "pairs.jsonl") -> dict[str, float]:
    """The figures of a saved model; of pairs where there are some."""
    model, processor = vlkit.from_pretrained(folder).eval(), Processor.from_pretrained(folder)
    questions = list(open_source(data / "questions.jsonl"))
    drawn = [
        readings(model, processor, questions, temperature=1.0, seed=number * len(questions)) for number in range(4)
    ]
    figures = {
        "exact": share_right(readings(model, processor, questions), questions),
        "drawn": statistics.fmean(share_right(answers, questions) for answers in drawn),
    }
    if (data / pairs).exists():
        samples = list(open_source(data / pairs))
        chosen, rejected = (
            log_probs(model, processor, [pair["messages"] + pair[side] for pair in samples])
            for side in ("chosen", "rejected")
        )
        figures["preferred"] = float((chosen > rejected).double().mean())
    return figures


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps({"model": name, **evaluate(Path(name), Path("digits/unseen"))}))
