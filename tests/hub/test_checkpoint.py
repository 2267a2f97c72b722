"""Checkpoint folders: what is missing, foreign or dangerous is named before a tensor is read."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.hub.files import assert_same_bits, write_file, write_folder_of
from vlkit.errors import CheckpointError, ConfigError, CorruptCheckpointError, UnsafePathError
from vlkit.hub import checkpoint as module
from vlkit.hub.checkpoint import (
    open_checkpoint,
    parse_size,
    verify_manifest,
    write_checkpoint,
    write_manifest,
)
from vlkit.hub.index import INDEX, MANIFEST, WEIGHTS, is_weight_file

STATE = {f"blocks.{i}.weight": torch.randn(3, 5).bfloat16() * (i + 1) for i in range(7)} | {"norm": torch.randn(5)}
SHARD = "30B"  # one tensor of STATE, so eight files


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    return str(caught.value)


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(changes)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("size", ["5GB", SHARD, "70B", 1])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, size: int | str) -> None:
    with open_checkpoint(write_folder_of(tmp_path, STATE, size)) as checkpoint:
        assert_same_bits({name: checkpoint.read(name) for name in checkpoint.tensors}, STATE)
        assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in STATE.items()}
        assert checkpoint.num_bytes == sum(t.numel() * t.itemsize for t in STATE.values())


def test_shards_are_named_and_indexed_as_on_the_hub(tmp_path: Path) -> None:
    write_folder_of(tmp_path, STATE, "70B")  # two tensors of 30 bytes to a file

    names = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 7 * 30 + 20}
    assert index["weight_map"]["blocks.2.weight"] == names[1]
    for name in names:
        with safetensors.safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_one_tensor_larger_than_a_shard_gets_its_own_file(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1), "big": torch.zeros(100), "b": torch.zeros(1)}

    write_folder_of(tmp_path, state, "50B")

    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3


def test_only_one_file_is_mapped_at_a_time(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_folder_of(tmp_path, STATE, SHARD))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")

    for name in checkpoint.tensors:
        assert checkpoint.read(name).data_ptr() == checkpoint.read(name).data_ptr()  # not mapped anew
        assert sum(str(tmp_path) in line for line in maps.read_text().splitlines()) == 1
    checkpoint.close()
    assert str(tmp_path) not in maps.read_text()


def test_a_single_file_of_another_name_is_found(tmp_path: Path) -> None:
    write_file(tmp_path / "adapter.safetensors", {"a": torch.zeros(1)})

    assert open_checkpoint(tmp_path).tensors.keys() == {"a"}

    write_file(tmp_path / "other.safetensors", {"b": torch.zeros(1)})
    assert "belong together" in refusal(tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    assert "it has config.json" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        open_checkpoint(write_folder_of(tmp_path / "full", STATE)).read("x")


def test_all_missing_shards_are_listed_at_once(tmp_path: Path) -> None:
    write_folder_of(tmp_path, STATE, SHARD)
    (tmp_path / "model-00002-of-00008.safetensors").unlink()
    (tmp_path / "model-00007-of-00008.safetensors").unlink()

    message = refusal(tmp_path)

    assert "2 of 8 files" in message
    assert "model-00002-of-00008.safetensors, model-00007-of-00008.safetensors" in message


def test_an_index_that_lists_too_much_or_too_little_is_refused(tmp_path: Path) -> None:
    write_folder_of(tmp_path, STATE, SHARD)
    edit_index(tmp_path, **{f"ghost.{i}": "model-00001-of-00008.safetensors" for i in range(9)})
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["norm"]
    index["weight_map"]["blocks.5.weight"] = "model-00008-of-00008.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))

    message = refusal(tmp_path)

    assert "listed but not in their files: blocks.5.weight, ghost.{0..8} (9)" in message
    assert "in the files but not listed: norm" in message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", {"x": torch.zeros(1), "y": torch.zeros(1)})
    write_file(tmp_path / "b.safetensors", {"x": torch.zeros(1), "z": torch.zeros(1)})
    weight_map = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    assert "in two files: x (a.safetensors and b.safetensors)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "key 'a' appears twice"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ("{}", "expected a weight_map"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / INDEX).write_text(text)

    assert what in refusal(tmp_path)


@pytest.mark.parametrize("broken", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>"])
def test_a_shard_that_is_something_else_is_refused_by_name(tmp_path: Path, broken: bytes) -> None:
    write_folder_of(tmp_path, STATE, SHARD)
    (tmp_path / "model-00003-of-00008.safetensors").write_bytes(broken)

    message = refusal(tmp_path)

    assert "model-00003-of-00008.safetensors" in message
    assert "this is" in message


# Names that would leave the folder. The canary is a valid file outside: it must not be opened.

UNSAFE = [
    "../canary.safetensors",
    "sub/../../canary.safetensors",
    "./canary.safetensors",
    "/etc/canary.safetensors",
    "..\\canary.safetensors",
    "C:canary.safetensors",
    "C:\\canary.safetensors",
    "\\\\host\\share\\canary.safetensors",
    "//host/share/canary.safetensors",
    "canary.safetensors\0",
    "canary\n.safetensors",
    " canary.safetensors",
    "",
    ".",
    "..",
    "canary.bin",
    "canary.safetensors.py",
    None,
    3,
    ["canary.safetensors"],
]


@pytest.mark.parametrize("name", UNSAFE)
def test_shard_names_that_are_no_plain_names_are_never_opened(
    tmp_path: Path, name: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "canary.safetensors", {"a": torch.zeros(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    monkeypatch.setattr(module, "read_header", lambda path, **_: pytest.fail(f"opened {path}"))

    with pytest.raises(UnsafePathError):
        open_checkpoint(folder)


def test_links_that_leave_the_folder_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = write_file(tmp_path / "canary.safetensors", {"a": torch.zeros(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / WEIGHTS).symlink_to(canary)
    monkeypatch.setattr(module, "read_header", lambda path, **_: pytest.fail(f"opened {path}"))

    with pytest.raises(UnsafePathError, match=r"canary\.safetensors, outside of the checkpoint"):
        open_checkpoint(folder)


def test_a_linked_index_that_leaves_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "canary.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / INDEX).symlink_to(tmp_path / "canary.json")

    with pytest.raises(UnsafePathError):
        open_checkpoint(tmp_path / "model")


def test_links_inside_the_folder_and_the_hubs_own_are_legal(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    write_file(inside / "real.safetensors", {"a": torch.ones(1)})
    (inside / WEIGHTS).symlink_to("real.safetensors")
    assert open_checkpoint(inside).read("a").item() == 1

    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    write_file(repository / "blobs" / "0123", {"a": torch.ones(1)})
    (snapshot / WEIGHTS).symlink_to("../../blobs/0123")
    assert open_checkpoint(snapshot).read("a").item() == 1

    # The same link into another repository's blobs, and out of blobs, is not.
    other = tmp_path / "models--owner--other" / "snapshots" / "abc"
    other.mkdir(parents=True)
    (other / WEIGHTS).symlink_to(repository / "blobs" / "0123")
    with pytest.raises(UnsafePathError):
        open_checkpoint(other)


def test_a_dangling_link_and_a_pipe_are_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).symlink_to("gone")
    assert "a link to a file that is gone" in refusal(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    os.mkfifo(tmp_path / WEIGHTS)
    assert "not a regular file" in refusal(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    assert "not a regular file" in refusal(tmp_path)


# Pickles.


class Canary:
    """Unpickling it without restrictions creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickled_weights_need_a_flag(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")

    assert "allow_pickle=True" in refusal(tmp_path)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert_same_bits({name: checkpoint.read(name) for name in checkpoint.tensors}, STATE)


def test_sharded_pickles_are_read_with_the_flag(tmp_path: Path) -> None:
    names = list(STATE)
    files = {"pytorch_model-1.bin": names[:3], "pytorch_model-2.bin": names[3:]}
    for file, held in files.items():
        torch.save({name: STATE[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert "allow_pickle=True" in refusal(tmp_path)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert_same_bits({name: checkpoint.read(name) for name in checkpoint.tensors}, STATE)


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02never read")
    write_folder_of(tmp_path, STATE)

    assert open_checkpoint(tmp_path, allow_pickle=True).tensors.keys() == STATE.keys()


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "canary"
    if legacy:
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Canary(canary)}, protocol=2))
    else:
        torch.save({"a": Canary(canary)}, tmp_path / "pytorch_model.bin")

    assert "weights_only" in refusal(tmp_path, allow_pickle=True)
    assert not canary.exists()


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_distributed_checkpoint_is_named_and_its_pickle_never_read(tmp_path: Path, allow_pickle: bool) -> None:
    canary = tmp_path / "canary"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "__0_0.distcp").write_bytes(b"PK\x03\x04")

    assert "a distributed checkpoint of torch" in refusal(tmp_path, allow_pickle=allow_pickle)
    assert not canary.exists()


@pytest.mark.parametrize("state", [[torch.zeros(1)], {"a": 3}, torch.zeros(1)])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")

    assert "expected a dictionary of tensors" in refusal(tmp_path, allow_pickle=True)


def test_a_pointer_instead_of_a_pickle_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    assert "git lfs pull" in refusal(tmp_path, allow_pickle=True)


# Sizes and manifests.


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), ("2TiB", 2 * 2**40), (7, 7), ("10B", 10)],
)
def test_sizes_are_read_as_the_hub_writes_them(text: int | str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0B", 0, -3, True, "5 XB", "1e3GB", "5iB", "", None, 1.5])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)


def test_flipped_bytes_are_found_by_the_manifest(tmp_path: Path) -> None:
    write_folder_of(tmp_path, STATE, "70B")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    shard = tmp_path / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (tmp_path / "model-00003-of-00004.safetensors").unlink()

    with pytest.raises(CorruptCheckpointError) as caught:
        verify_manifest(tmp_path)

    assert "model-00002-of-00004.safetensors has other contents" in str(caught.value)
    assert "model-00003-of-00004.safetensors is missing" in str(caught.value)
    assert "model-00001" not in str(caught.value)


@pytest.mark.parametrize("line", ["0" * 64 + "  ../x", "0" * 63 + "  x", "nonsense"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / MANIFEST).write_text(line + "\n")

    with pytest.raises(CheckpointError, match="line 1"):
        verify_manifest(tmp_path)


def test_weight_files_are_told_from_other_files() -> None:
    assert all(map(is_weight_file, [WEIGHTS, INDEX, MANIFEST, "model-00001-of-00012.safetensors"]))
    assert not any(map(is_weight_file, ["config.json", "adapter_model.safetensors", "model.safetensors.txt", "notes"]))


def test_a_file_is_never_overwritten_in_place(tmp_path: Path) -> None:
    """Somebody may have it mapped."""
    write_folder_of(tmp_path, STATE)

    with pytest.raises(FileExistsError):
        write_checkpoint(tmp_path, [("a", torch.float32, (1,))], lambda name: torch.zeros(1))
