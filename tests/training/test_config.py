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
