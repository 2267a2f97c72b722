"""Which text belongs to which image, among strips by writers that the model has never seen.

    python evaluation/retrieval.py runs/contrast/model          # in the folder of the examples

Recall at k: the share of images whose text is among the k most similar of all texts, and the other way round. Every text occurs
once; a random order has k / texts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import vlkit
from vlkit.packing import Layout, Packed
from vlkit.processing import Processor
from vlkit.training.contrast_heads import ContrastHeads
from vlkit.training.sources import open_source


@torch.no_grad()
def evaluate(folder: Path, data: Path) -> dict[str, float]:
    """Recalls of a saved model with its heads."""
    model, processor = vlkit.from_pretrained(folder).eval(), Processor.from_pretrained(folder)
    heads = ContrastHeads.from_pretrained(folder / "contrast")
    pairs = list({sample["text"]: sample for sample in open_source(data / "captions.jsonl")}.values())
    asked = [[{"role": "user", "content": [{"type": "image", "image": pair["image"]}]}] for pair in pairs]
    images = heads.images(model.vision(processor(asked).patches))
    ids = [processor.tokenizer.encode(pair["text"]) for pair in pairs]
    texts = heads.texts(Packed(torch.tensor([token for each in ids for token in each]), Layout(tuple(map(len, ids)))))
    similarity = images @ texts.T
    figures: dict[str, float] = {"texts": len(pairs)}
    for name, scores in (("image to text", similarity), ("text to image", similarity.T)):
        place = (scores > scores.diagonal()[:, None]).sum(1)  # how many are more similar than the right one
        for k in (1, 5):
            figures[f"{name}, recall at {k}"] = float((place < k).double().mean())
    return {**figures, "chance at 1": 1 / len(pairs), "chance at 5": 5 / len(pairs)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps({"model": name, **evaluate(Path(name), Path("digits/unseen"))}))
