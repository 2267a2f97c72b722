"""Training steps on packs of whole samples: against padding, the memory of the loss, and what cost grows with.

    python benchmarks/train.py [step] [memory] [loss] [scaling] [--threads 1] [--repeats 3] [--save]

    step     real tokens per second of an SFT step (forward, loss, backward, AdamW) against transformers' Qwen2-VL
    memory   peak memory of the same steps
    loss     the loss alone at a vocabulary of 151,936; see train_loss.py
    scaling  time against number of images, image size and pack length; see train_scaling.py

Without names all of it runs. --save writes benchmarks/results/train.json and docs/images/training-scaling.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import train_loss  # noqa: E402
import train_scaling  # noqa: E402
import train_step  # noqa: E402
from harness import machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "train.json"
PICTURE = ROOT / "docs" / "images" / "training-scaling.svg"
PARTS = {
    "step": train_step.run,
    "memory": train_step.run_memory,
    "loss": train_loss.run,
    "scaling": train_scaling.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    found: dict[str, Any] = {}
    for name in options.parts or PARTS:
        found[name] = {"machine": machine(), **PARTS[name](options.repeats)}
    if not options.save:
        return
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(old | found, indent=1) + "\n")
    if "scaling" in found:
        train_scaling.draw(found["scaling"], PICTURE)


if __name__ == "__main__":
    main()
