"""Building on meta: no memory, no draws, and no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import vlkit
from vlkit.models.meta import on_meta


def test_modules_made_on_meta_have_no_memory_and_leave_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    with on_meta():
        made = nn.ModuleList([nn.Linear(3, 4), nn.Embedding(5, 6), nn.Conv2d(1, 2, 3), nn.LayerNorm(2)])
        nn.init.trunc_normal_(made[0].weight)
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_tensors_with_memory_are_still_filled() -> None:
    table = torch.zeros(50, device="cpu")
    with on_meta():
        nn.init.normal_(table)
        table[25:].uniform_(5, 6)
    assert table[:25].std() > 0.3
    assert table[25:].min() >= 5


def test_loading_a_model_does_not_import_the_compiler(tmp_path: Path) -> None:
    """Random functions on meta would: more than a second before the first weight is read."""
    vlkit.create_model("moonvit-qwen3-tiny").save_pretrained(tmp_path)
    code = f"import sys, vlkit; vlkit.from_pretrained({str(tmp_path)!r}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "False"
