"""`vlkit train`: from a file to a saved model, the same under torchrun, and plain when it refuses or is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.training.samples import small_config, write_samples
from vlkit.cli import app
from vlkit.errors import ConfigError
from vlkit.training import EXIT_STOPPED, TrainConfig, read_train_config

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], catch_exceptions=False)


def write_config(folder: Path, **changes: Any) -> str:
    write_samples(folder)
    (folder / "run.json").write_text(json.dumps(small_config(folder, **changes).to_dict()))
    return str(folder / "run.json")


def test_a_file_becomes_a_model_that_answers(tmp_path: Path) -> None:
    write_samples(tmp_path)
    (tmp_path / "run.toml").write_text(
        'run = "out"\nsteps = 2\nbatch = 3\nlog_every = 1\npicture = false\n'
        '[model]\nname = "kimi-vl-tiny"\n[data]\nfiles = ["train.jsonl"]\n'
    )
    done = run(str(tmp_path / "run.toml"))
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].startswith("step 1/2  loss 5.")
    assert "tokens/s" in lines[0]
    assert lines[-1] == f"saved {tmp_path}/out/model"
    asked = ["generate", f"{tmp_path}/out/model", "--image", str(tmp_path / "1.png"), "--max-new-tokens", "2"]
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0


def test_run_and_steps_may_be_chosen_on_the_line(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    done = run(path, "--steps", "1", "--run", str(tmp_path / "other"))
    assert done.exit_code == 0
    assert (tmp_path / "other/model/config.json").exists()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="has checkpoints"):
        run(path, "--steps", "1", "--run", str(tmp_path / "other"), "--no-resume")


def test_a_run_that_is_stopped_has_its_own_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    echo = typer.echo

    def stop(line: str) -> None:
        echo(line)
        if line.startswith("step 2/"):
            os.kill(os.getpid(), signal.SIGTERM)

    path = write_config(tmp_path)
    monkeypatch.setattr(typer, "echo", stop)
    done = run(path)
    monkeypatch.undo()
    assert done.exit_code == EXIT_STOPPED == 75
    assert "stopped by SIGTERM after step 2" in done.output
    assert f"resumed from {tmp_path}/run/checkpoints/step-00000002" in run(path, "--steps", "3").output


def test_a_run_that_is_stopped_before_it_begins_goes_on_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path) -> TrainConfig:
        os.kill(os.getpid(), signal.SIGTERM)
        return read_train_config(path)

    path = write_config(tmp_path, steps=1, batch=1)
    monkeypatch.setattr("vlkit.training.read_train_config", stopped)
    assert run(path).exit_code == EXIT_STOPPED
    assert not (tmp_path / "run/model").exists()
    monkeypatch.undo()
    assert run(path).exit_code == 0
    assert (tmp_path / "run/model").exists()


def test_torchrun_runs_the_same_command(tmp_path: Path) -> None:
    path = write_config(tmp_path, steps=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "vlkit", "train", path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2  loss") == 1  # the first rank speaks
    assert json.loads((tmp_path / "run/checkpoints/step-00000002/state.json").read_text())["ranks"] == 2
    assert (tmp_path / "run/model/config.json").exists()


def test_the_example_is_a_config_that_can_be_run() -> None:
    config = read_train_config(ROOT / "examples/train.toml")
    assert config.data.files == (str(ROOT / "examples/digits/seen/conversations.jsonl"),)
