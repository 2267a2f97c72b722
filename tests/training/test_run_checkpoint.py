"""Checkpoints of a run: published whole or not at all, the newest complete one is found, damage is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests.ranks import CONTEXT
from tests.training.samples import small_config
from tests.training.test_loop import until, weights
from vlkit.errors import CheckpointError, CorruptCheckpointError, DiskFullError, KeyMismatchError
from vlkit.optim import Muon, muon_param_groups
from vlkit.training import train
from vlkit.training.run_checkpoint import (
    check_complete,
    complete_checkpoints,
    load_checkpoint,
    published,
    run_lock,
    save_checkpoint,
)


def parts(value: float = 0.0) -> tuple[nn.Module, Muon]:
    """A model and an optimizer whose every number is `value`."""
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    optimizer = Muon(muon_param_groups(model), lr=1e-3)
    with torch.no_grad():
        for tensor in numbers(model, optimizer):
            tensor.fill_(value)
    return model, optimizer


def numbers(model: nn.Module, optimizer: Muon) -> list[torch.Tensor]:
    return [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, *parts(float(step)), {"step": step}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_loads(path: Path, step: int) -> None:
    model, optimizer = parts()
    assert load_checkpoint(path, model, optimizer) == {"step": step}
    assert {value for tensor in numbers(model, optimizer) for value in tensor.flatten().tolist()} == {float(step)}


def test_the_newest_stay_and_all_is_loaded_again(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        save(tmp_path, step)
    assert names(tmp_path) == ["LATEST", "step-00000002", "step-00000030"]
    assert (tmp_path / "LATEST").read_text() == "step-00000030\n"
    complete, skipped = complete_checkpoints(tmp_path)
    assert [path.name for path in complete] == ["step-00000030", "step-00000002"]
    assert not skipped
    assert_loads(complete[0], 30)
    assert_loads(complete[1], 2)


def test_a_published_checkpoint_is_never_written_to_again(tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in save(tmp_path, 1).rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match="exists already"):
        save_checkpoint(tmp_path, 1, *parts(5.0), {})
    assert {file: file.read_bytes() for file in (tmp_path / "step-00000001").rglob("*") if file.is_file()} == before
    assert names(tmp_path) == ["LATEST", "step-00000001"]


def test_two_runs_do_not_work_in_one_folder(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=1)
    with run_lock(tmp_path / "run"):
        with pytest.raises(CheckpointError, match=rf"run: another run is at work here, process {os.getpid()} on "):
            train(config)
        assert names(tmp_path / "run") == [".lock"]
    train(config)


def test_a_file_in_the_place_of_the_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(CheckpointError, match="run: there is a file where a folder is needed"):
        train(small_config(tmp_path))
    with pytest.raises(CheckpointError, match="run/inner: there is a file where a folder is needed"):
        train(small_config(tmp_path, run=str(tmp_path / "run/inner")))
    assert (tmp_path / "run").read_text() == "mine"


class Damage(NamedTuple):
    file: str
    do: str
    message: str


DAMAGES = (
    Damage("manifest.json", "remove", "never finished"),
    Damage("manifest.json", "cut", "not UTF-8"),
    Damage("state.json", "flip", "contents have changed"),
    Damage("model/index.json", "remove", "missing"),
    Damage("optimizer/shard-00000-of-00001.safetensors", "cut", "bytes, manifest.json says"),
    Damage("model/shard-00000-of-00001.safetensors", "flip", "contents have changed"),
)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        data[-3] ^= 0xFF
        path.write_bytes(data[:-2] if how == "cut" else data)


@pytest.mark.parametrize("damaged", DAMAGES, ids=lambda d: f"{d.do}-{d.file}")
def test_damage_is_named(tmp_path: Path, damaged: Damage) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / damaged.file, damaged.do)
    complete, skipped = complete_checkpoints(tmp_path)
    assert [each.name for each in complete] == ["step-00000001"]
    assert len(skipped) == 1
    assert damaged.message in skipped[0]
    assert damaged.file.rpartition("/")[2] in skipped[0]


def test_a_checkpoint_with_the_name_of_another_step_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 6)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000009")
    complete, (line,) = complete_checkpoints(tmp_path)
    assert [path.name for path in complete] == ["step-00000006"]
    assert line.startswith("step-00000009 is skipped")
    assert "manifest.json is of step 4" in line


def test_damage_in_a_large_file_is_found_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlkit.training.run_checkpoint.SMALL", 0)
    path = save(tmp_path, 2)
    damage(path / "optimizer/shard-00000-of-00001.safetensors", "flip")
    check_complete(path)
    model, optimizer = parts()
    with pytest.raises(CorruptCheckpointError, match="another checksum"):
        load_checkpoint(path, model, optimizer)
    assert {value for tensor in numbers(model, optimizer) for value in tensor.flatten().tolist()} == {0.0}


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    with pytest.raises(KeyMismatchError, match=r"2\.weight"):
        load_checkpoint(path, model, Muon(muon_param_groups(model), lr=1e-3))


@pytest.mark.parametrize("flip_in", ["model", "optimizer"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, flip_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlkit.training.run_checkpoint.SMALL", 0)  # so that it is found as late as in a large file
    config = small_config(tmp_path, steps=4, checkpoints={"every": 1})
    train(config)
    expected = weights(config)
    damage(tmp_path / f"run/checkpoints/step-00000004/{flip_in}/shard-00000-of-00001.safetensors", "flip")
    lines: list[str] = []
    train(config, say=lines.append)
    assert lines[0].startswith("step-00000004 is skipped:")
    assert "checksum" in lines[0]
    assert lines[1].endswith("step-00000003, 1 steps are left")
    found = [path.name for path in published(tmp_path / "run/checkpoints")]
    assert found == ["step-00000004", "step-00000003"]
    assert len(list((tmp_path / "run/checkpoints").glob("step-00000004.damaged-*"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), weights(config).values(), strict=True))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    train(config)
    damage(tmp_path / "run/checkpoints/step-00000002/manifest.json", "remove")
    with pytest.raises(CheckpointError, match="no checkpoint is complete"):
        train(config)
    assert published(tmp_path / "run/checkpoints")


def test_a_disk_without_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=70)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"needs \d+ bytes .* has 70"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["LATEST", "step-00000001"]


@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_disk_that_fills_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save(tmp_path, 1)
    calls, fsync = [0], os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["LATEST", "step-00000001"]
    assert_loads(tmp_path / "step-00000001", 1)
    save(tmp_path, 2)


def test_a_run_that_finds_the_disk_full_keeps_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, steps=4, checkpoints={"every": 1})
    until(config, 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError) as caught:
        train(config)
    assert "newest checkpoint is" in caught.value.__notes__[0]
    assert "step-00000002" in caught.value.__notes__[0]
    monkeypatch.undo()
    assert train(config).steps == 4


def save_and_die(folder: Path, step: int, call: int) -> None:
    """Save, and be killed at a call of the file system."""
    torch.set_num_threads(1)
    built, count = parts(float(step)), [0]

    def look(event: str, _: Any) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            count[0] += 1
            if count[0] > call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    save_checkpoint(folder, step, *built, {"step": step}, keep=1)
    os._exit(0)


def test_a_process_killed_while_saving_leaves_the_old_state_or_the_new(tmp_path: Path) -> None:
    outcomes = set()
    for call in range(1, 60, 7):
        folder = tmp_path / str(call)
        save(folder, 1)
        process = CONTEXT.Process(target=save_and_die, args=(folder, 2, call))
        process.start()
        process.join()
        complete, skipped = complete_checkpoints(folder)
        assert not skipped
        assert_loads(complete[0], step := int(complete[0].name[-1]))
        outcomes.add((step, process.exitcode))
        save(folder, 3, keep=1)
        assert names(folder) == ["LATEST", "step-00000003"]
    assert (1, -signal.SIGKILL) in outcomes
    assert outcomes <= {(1, -signal.SIGKILL), (2, -signal.SIGKILL), (2, 0)}


def test_the_manifest_is_the_last_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    listed = {entry["name"] for entry in json.loads((path / "manifest.json").read_text())["files"]}
    assert listed == {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()} - {"manifest.json"}
