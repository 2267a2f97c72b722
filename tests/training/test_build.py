"""What a run is made of: sizes that cannot be are refused, parts have their rates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlkit
from tests.training.conversations import image, says
from tests.training.samples import small_config, write_samples
from vlkit.errors import ConfigError, SampleError
from vlkit.training.build import describe_model, make_optimizer, make_reader, open_sources
from vlkit.training.ranks import Ranks
from vlkit.training.reader import Reader
from vlkit.training.tasks.next_token import NextToken, NextTokenOptions
from vlkit.training.tasks.task import Item, Setup


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


@cache
def tiny() -> Any:
    return vlkit.create_model("kimi-vl-tiny")


def opened_reader(folder: Path, data: dict[str, Any], **changes: Any) -> Reader[Item]:
    """The reader of a config over `streams` or the samples of `folder`."""
    files = {} if "streams" in data else {"files": [str(folder / "train.jsonl")]}
    config = small_config(folder, data={**files, "workers": 0, **data}, **{"micro_batch": None, **changes})
    processor, alone = vlkit.create_processor("kimi-vl-tiny"), Ranks(0, 1, torch.device("cpu"))
    task = NextToken(NextTokenOptions(), Setup(tiny(), processor, config, alone, tiny))
    return make_reader(config, open_sources(config, processor), task, tiny(), alone, seed=0)


def test_what_is_too_long_is_left_out_where_the_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"more than data\.max_tokens = 100"):
        opened_reader(tmp_path, {"max_tokens": 100}, batch=13).read(0.0)
    share = opened_reader(tmp_path, {"max_tokens": 100, "too_long": "skip"}, batch=13).read(0.0)
    assert 0 < share.corrupt < 13 == share.samples


def test_streams_are_mixed_by_the_shares_of_the_config(tmp_path: Path) -> None:
    write_samples(tmp_path / "other", 5)
    lines = [str(write_samples(tmp_path)), str(tmp_path / "other" / "train.jsonl")]
    streams = [{"name": str(i), "files": [lines[i]], "share": (0.9, 0.1)[i]} for i in (0, 1)]
    reader = opened_reader(tmp_path, {"streams": streams}, batch=40)
    reader.read(0.0)
    tokens = reader.state_dict()["draws"]["tokens"]
    assert abs(tokens[1] / sum(tokens) - 0.1) < 0.04


def test_forwards_keep_to_the_budgets_of_the_config(tmp_path: Path) -> None:
    """Of one kind or the other; of patches too."""

    def most(name: str, data: dict[str, Any], **changes: Any) -> int:
        packs = opened_reader(tmp_path, data, batch=13, **changes).read(0.0).packs
        return max(sum(getattr(item, name) for item in pack) for pack in packs)

    assert 200 < most("num_tokens", {"pack_tokens": 300}) <= 300
    assert 300 < most("num_tokens", {}, micro_batch_tokens=400) <= 400
    assert most("num_patches", {"pack_tokens": 9999, "pack_patches": 250}) <= 250
