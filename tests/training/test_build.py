"""What a run is made of: sizes that cannot be are refused, parts have their rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlkit
from tests.training.conversations import image, says
from tests.training.samples import small_config
from vlkit.errors import ConfigError
from vlkit.training.build import describe_model, make_optimizer, open_sources
from vlkit.training.ranks import Ranks


def test_a_model_that_torch_cannot_describe_is_refused(tmp_path: Path) -> None:
    vision = {"type": "moonvit", "dim": 10**9, "num_heads": 10**6}
    with pytest.raises(ConfigError, match="this model cannot be built, even without memory"):
        describe_model(small_config(tmp_path, model={"vision": vision, "llm": "qwen3-tiny"}))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_rate_of_the_run_is_the_one_that_decays_over_layers(tmp_path: Path, kind: str) -> None:
    decay = {"layer_decay": {"vision": 0.5}, "part_lr": {"projector": 2e-3}}
    config = small_config(tmp_path, optimizer={"kind": kind, "lr": 1e-3, **decay})
    model = vlkit.create_model("kimi-vl-tiny")
    groups = make_optimizer(model, config, Ranks(0, 1, torch.device("cpu"))).param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    depth = len(model.vision.blocks)
    assert rates[f"vision.blocks.{depth - 1}.attn.q.weight"] == pytest.approx(1e-3 * 0.5)
    assert rates["vision.blocks.0.attn.q.weight"] == pytest.approx(1e-3 * 0.5**depth)
    assert {rate for name, rate in rates.items() if name.startswith("llm.")} == {1e-3}
    assert {rate for name, rate in rates.items() if name.startswith("projector.")} == {2e-3}


def test_groundings_of_one_image_are_one_sample_where_the_config_says_so(tmp_path: Path) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "screen.png")
    with (tmp_path / "train.jsonl").open("w") as file:
        for index in range(7):
            messages = [says("user", image("screen.png"), f"where is {index}?"), says("assistant", f"at {index}")]
            file.write(json.dumps({"messages": messages}) + "\n")
    processor = vlkit.create_processor("kimi-vl-tiny")

    def opened(**data: Any) -> Any:
        files = {"files": [str(tmp_path / "train.jsonl")], "max_tokens": 300}
        [source] = open_sources(small_config(tmp_path, data={**files, **data}), processor)
        return source

    assert len(opened()) == 7
    joined = opened(join_groundings=True)
    assert 1 < len(joined) < 7
    lengths = [processor.measure(joined[index]["messages"], labels=True).tokens for index in range(len(joined))]
    assert max(lengths) <= 300 < sum(lengths)
    assert joined.fingerprint() != opened().fingerprint()
    with pytest.raises(ConfigError, match="joined up to max_tokens; set it"):
        opened(join_groundings=True, max_tokens=None)
