"""The guard names the part that gives the first number that is not finite."""

from __future__ import annotations

import pytest
import torch

import vlkit
from vlkit.errors import NonFiniteError
from vlkit.testing import random_batch
from vlkit.training.finite import finite_guard


@pytest.mark.parametrize(
    ("parameter", "part"),
    [
        ("vision.blocks.1.mlp.up.weight", r"vision\.blocks\.1 gives"),
        ("llm.blocks.0.norm1.weight", r"llm\.blocks\.0 gives"),
        ("llm.norm.weight", r"llm\.norm gives"),
    ],
)
def test_the_first_bad_part_is_named(parameter: str, part: str) -> None:
    model = vlkit.create_model("qwen2.5-vl-tiny")
    batch = random_batch(model)
    with torch.no_grad():
        model.get_parameter(parameter).fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=part), finite_guard(model):
        model(batch)
    model(batch)  # no longer watched


def test_an_overflow_of_fp16_is_told_what_helps() -> None:
    model = vlkit.create_model("qwen2.5-vl-tiny")
    batch = random_batch(model)
    with torch.no_grad():
        model.llm.norm.weight.fill_(60000.0)
    model.llm.norm.register_forward_hook(lambda _module, _inputs, output: output.half() * 2)
    with pytest.raises(NonFiniteError, match="use bf16 or fp32"), finite_guard(model):
        model(batch)


def test_a_healthy_model_passes() -> None:
    model = vlkit.create_model("kimi-vl-tiny")
    with finite_guard(model):
        assert model(random_batch(model)).loss.isfinite()
