"""The config of a run: read from TOML and JSON, strict, paths seen from its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.samples import small_config
from vlkit.errors import ConfigError
from vlkit.training import TrainConfig, read_train_config

TOML = """
run = "runs/first"
steps = 7
[model]
name = "kimi-vl-tiny"
[model.overrides.llm]
num_layers = 2
[data]
files = ["a.jsonl", "sub/b.jsonl"]
[optimizer.part_lr]
vision = 0.1
"""


def test_toml_and_json_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    config = read_train_config(tmp_path / "c.toml")
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert read_train_config(tmp_path / "c.json") == config
    assert config.optimizer.part_lr == {"vision": 0.1}


def test_paths_are_seen_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    config = read_train_config(tmp_path / "c.toml")
    assert config.run == str(tmp_path / "runs/first")
    assert config.data.files == (str(tmp_path / "a.jsonl"), str(tmp_path / "sub/b.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"steps": None}, "either steps or epochs"),
        ({"model": {"name": "kimi-vl-tiny", "folder": "x"}}, "one of name, folder"),
        ({"model": {"vision": "moonvit-tiny"}}, "needs vision and llm"),
        ({"data": {"files": []}}, "no files"),
        ({"optimizer": {"part_lr": {"vision": "fast"}}}, "part_lr.vision: expected a number above 0"),
        ({"schedule": {"warmup": 8, "decay": 3}}, "do not fit into steps=10"),
        ({"ranks": {"expert_parallel": 2}}, "need sharding = 'fsdp'"),
        ({"ranks": {"timeout_minutes": 1e300}}, "timeout_minutes: .* is above"),
        ({"compute_dtype": "float64"}, "compute_dtype: 'float64' with dtype = 'float32' is not possible"),
        ({"dtype": "bfloat16", "compute_dtype": "float32"}, "goes with dtype = 'float32'"),
        ({"run": ""}, "run: expected a path, found ''"),
        ({"objective": "dpo"}, "objective: expected a table with kind, found 'dpo'"),
        ({"objective": {"kind": "next-tokens"}}, "there is no 'next-tokens'; did you mean 'next-token'"),
        ({"objective": {"kind": "next-token", "z_loss": -1.0}}, "z_loss: -1.0 is below 0"),
        ({"train": []}, "train: nothing is named"),
        ({"packs": 2}, "packs of how many tokens"),
        (
            {"packs": 2, "micro_batch": 2, "data": {"files": ["a"], "pack_tokens": 9}},
            "micro_batch: data.pack_tokens already says",
        ),
        ({"packs": 2, "batch": 5, "data": {"files": ["a"], "pack_tokens": 9}}, "either batch samples or packs packs"),
        ({"objective": {"kind": "contrast"}}, "micro_batch: contrast takes all samples of a rank in one forward"),
        (
            {"objective": {"kind": "contrast"}, "micro_batch": None, "micro_batch_tokens": 9},
            "micro_batch_tokens: contrast takes all samples",
        ),
        (
            {"objective": {"kind": "contrast"}, "micro_batch": None, "data": {"files": ["a"], "pack_tokens": 9}},
            "data.pack_tokens: contrast takes all samples",
        ),
        (
            {"objective": {"kind": "contrast"}, "micro_batch": None, "data": {"files": ["a"], "images_first": 0.5}},
            "images_first: contrast shows the image first in any case",
        ),
        (
            {"objective": {"kind": "dpo"}, "data": {"files": ["a"], "join_groundings": True, "max_tokens": 9}},
            "join_groundings: samples of dpo are no conversations",
        ),
        (
            {"micro_batch_tokens": 8, "data": {"files": ["a"], "pack_tokens": 9}},
            "micro_batch_tokens: data.pack_tokens already says",
        ),
        ({"data": {"files": ["a"], "pack_patches": 9}}, "pack_patches: packs are limited by tokens too"),
        ({"rope_theta": 0.0}, "rope_theta: 0.0 is below or equal to 0"),
        ({"max_positions": 99}, "max_positions: more positions go with another rope_theta"),
        ({"lora": {"rank": 0}}, "LoraOptions.rank: 0 is below 1"),
        ({"balance_rule": "even"}, "balance_rule: 'even' is not one of 'centred', 'sign'"),
        ({"keep_state": 1}, "keep_state: expected bool, found 1"),
        ({"tensorboard": "yes"}, "tensorboard: expected bool, found 'yes'"),
        ({"picture": "yes"}, "picture: expected bool, found 'yes'"),
        ({"schedule": {"warmup": 1.5}}, "warmup: expected int, found 1.5"),
        ({"schedule": {"warmup": 0.6, "decay": 0.5}}, "warmup=0.6 and decay=0.5 do not fit into steps=10"),
        ({"data": {"files": ["a"], "streams": [{"name": "a", "files": ["a"]}]}}, "either files or streams"),
        ({"data": {"streams": [{"name": "a", "files": []}]}}, "no files in stream 'a'"),
        ({"data": {"streams": [{"name": " ", "files": ["a"]}]}}, "Stream.name: expected a name, found ' '"),
        ({"data": {"streams": [{"name": "a", "files": ["a"]}] * 2}}, "two streams are called 'a'"),
        ({"data": {"streams": [{"name": "a", "files": ["a"], "share": -1.0}]}}, "a share is at least 0"),
        (
            {"data": {"streams": [{"name": "a", "files": ["a"], "share": [[0.5, 1], [0.2, 1]]}]}},
            "points of rising progress",
        ),
        ({"data": {"files": ["a"], "draws": "easy"}}, "draws: 'easy' is not one of"),
        ({"data": {"files": ["a"], "curriculum": [0.1, 0.5]}}, "curriculum goes with draws = 'curriculum'"),
        (
            {"data": {"streams": [{"name": "a", "files": ["a"], "share": 0.5}], "draws": "curriculum"}},
            "with draws = 'curriculum' streams have no shares",
        ),
        (
            {"steps": None, "epochs": 1.0, "packs": 1, "micro_batch": None, "data": {"files": ["a"], "pack_tokens": 9}},
            "give steps",
        ),
        ({"steps": None, "epochs": 1.0, "data": {"streams": [{"name": "a", "files": ["a"]}]}}, "give steps"),
        ({"run": "a\0b"}, r"run: expected a path, found 'a\\x00b'"),
        ({"data": {"files": ["a\0b"]}}, "files: expected a path"),
        ({"model": {"folder": "a\0b"}}, "folder: expected a path"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, **change)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("run = ")
    with pytest.raises(ConfigError, match=r"c\.toml: not TOML"):
        read_train_config(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_train_config(tmp_path / "missing.toml")


def test_a_config_survives_json(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_lengths_of_a_schedule_may_be_shares_of_all_steps(tmp_path: Path) -> None:
    schedule = small_config(tmp_path, schedule={"warmup": 0.03, "decay": 0.5}).schedule
    assert [schedule.steps(total) for total in (10, 100, 1000, 3)] == [(1, 5), (3, 50), (30, 500), (1, 2)]
    assert small_config(tmp_path, schedule={"warmup": 2}).schedule.steps(10) == (2, None)


def test_the_paths_of_stages_and_streams_are_seen_from_the_file(tmp_path: Path) -> None:
    text = TOML.replace('files = ["a.jsonl", "sub/b.jsonl"]', 'streams = [{name = "a", files = ["a.jsonl"]}]')
    text += '[[stages]]\nname = "one"\n[[stages]]\nname = "two"\ndata = {files = ["sub/b.jsonl"]}\n'
    (tmp_path / "c.toml").write_text(text)
    stages = read_train_config(tmp_path / "c.toml").resolved_stages()
    assert [own.data.paths for _, own in stages] == [(str(tmp_path / "a.jsonl"),), (str(tmp_path / "sub/b.jsonl"),)]
