"""The safetensors format: equal to its own package, and unimpressed by what a header claims."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.hub.files import assert_same_bits, entry, raw_file, write_file
from vlkit.errors import CheckpointError, CorruptCheckpointError
from vlkit.hub.safetensors_file import MAX_HEADER_BYTES, MAX_TENSORS, MappedFile, read_header, write_safetensors

STATE = {
    "b": torch.tensor([[1.5, float("nan"), -0.0]], dtype=torch.bfloat16),
    "a": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "double": torch.randn(2, 1, 3).double(),
    "ids": torch.arange(5),
    "empty": torch.empty(0, 4),
    'odd "näme"': torch.tensor(3.25),
    "flag": torch.tensor([True, False, True]),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "signed": torch.arange(-1, 2, dtype=torch.int8),
    "e4m3": torch.tensor([0.5, -2.0, 448.0]).to(torch.float8_e4m3fn),
    "e5m2": torch.tensor([0.5, -2.0, 3.0]).to(torch.float8_e5m2),
    "e8m0": torch.tensor([1, 2, 3], dtype=torch.uint8).view(torch.float8_e8m0fnu),
}


def read_all(path: Path) -> dict[str, Tensor]:
    file = MappedFile(read_header(path))
    return {name: file.read(name) for name in file.header.tensors}


def refusal(path: Path, **limits: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(path, **limits)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_writes_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    """The same header and data; only the spaces between them are more, so that the data are aligned."""
    safetensors.torch.save_file(STATE, tmp_path / "theirs", metadata={"format": "pt"})
    tensors = [(name, tensor.dtype, tensor.shape) for name, tensor in STATE.items()]

    write_safetensors(tmp_path / "ours", tensors, STATE.__getitem__, metadata={"format": "pt"})

    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    ends = [8 + int.from_bytes(data[:8], "little") for data in (ours, theirs)]
    assert ours[8 : ends[0]].rstrip() == theirs[8 : ends[1]].rstrip()
    assert ours[ends[0] :] == theirs[ends[1] :]
    assert ends[0] % 64 == 0
    assert_same_bits(safetensors.torch.load_file(tmp_path / "ours"), STATE)
    assert read_header(tmp_path / "theirs").metadata == {"format": "pt"}


def test_reads_what_the_safetensors_package_wrote_bit_for_bit(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "file")

    assert_same_bits(read_all(tmp_path / "file"), STATE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.int64]), min_size=4, max_size=4),
)
def test_any_shapes_and_types_come_back(tmp_path: Path, shapes: list[list[int]], dtypes: list[torch.dtype]) -> None:
    state = {f"t{i}": (torch.randn(shape) * 9).to(dtypes[i]) for i, shape in enumerate(shapes)}
    path = tmp_path / "file"
    path.unlink(missing_ok=True)

    assert_same_bits(read_all(write_file(path, state)), state)


def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    """Other writers need not align."""
    data = b"\x07" + torch.tensor([1.0, 2.0]).numpy().tobytes()
    header = {"byte": entry("U8", [1], [0, 1]), "floats": entry("F32", [2], [1, 9])}

    found = read_all(raw_file(tmp_path / "file", header, data))

    assert found["floats"].tolist() == [1.0, 2.0]
    assert found["floats"].data_ptr() % 4 == 0


def test_a_read_tensor_is_a_view_of_the_file_and_never_writes_to_it(tmp_path: Path) -> None:
    path = write_file(tmp_path / "file", {"a": torch.zeros(4)})
    before = path.read_bytes()
    file = MappedFile(read_header(path))

    first, second = file.read("a"), file.read("a")
    first.fill_(7.0)

    assert first.data_ptr() == second.data_ptr()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"", "an empty file"),
        (b"abc", "too few"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n  <!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"<HTML><head>", "an HTML page"),
        (b"PK\x03\x04" + b"\0" * 40, "a zip archive"),
        (b"\x80\x02}q\0." + b"\0" * 40, "a Python pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 40, "a GGUF file"),
        (b"\xff" * 40, "announce a header of 18446744073709551615 bytes"),
    ],
)
def test_other_files_are_recognised_by_name(tmp_path: Path, contents: bytes, what: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)

    assert what in refusal(path)


def test_truncated_and_extended_files_give_both_sizes(tmp_path: Path) -> None:
    path = write_file(tmp_path / "model.safetensors", {"a": torch.zeros(10), "b": torch.zeros(3)})
    whole = path.read_bytes()

    path.write_bytes(whole[:-5])
    assert f"truncated: {len(whole) - 5} bytes, its header says {len(whole)}" in refusal(path)
    path.write_bytes(whole + b"xyz")
    assert f"extra bytes at its end: {len(whole) + 3} bytes, its header says {len(whole)}" in refusal(path)
    path.write_bytes(whole[:30])
    assert "the file has 30" in refusal(path)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
         "key 'a' appears twice"),
        ('{"a":{"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]}}', "key 'dtype' appears twice"),
        ("[]", "found a list"),
        ('{"a": NaN}', "NaN"),
        (b"\xff\xfe{}", "UTF-16"),
        ({"a": 3}, "expected dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": entry(shape=[-2])}, "not a list of sizes"),
        ({"a": entry(shape=[True, 2])}, "not a list of sizes"),
        ({"a": entry(shape=[2.0])}, "not a list of sizes"),
        ({"a": entry(shape="2")}, "not a list of sizes"),
        ({"a": entry(shape=[2**63])}, "not a list of sizes"),
        ({"a": entry(shape=[2**40, 2**40])}, "needs 4835703278458516698824704 bytes, the header gives it 8"),
        ({"a": entry(offsets=[0, -8])}, "not two byte offsets"),
        ({"a": entry(offsets=[0])}, "not two byte offsets"),
        ({"a": entry(offsets=[False, 8])}, "not two byte offsets"),
        ({"a": entry(offsets=[8, 0])}, "needs 8 bytes, the header gives it -8"),
        ({"a": entry(offsets=[0, 4])}, "needs 8 bytes, the header gives it 4"),
        ({"a": entry(), "b": entry()}, "'b' overlaps another"),
        ({"a": entry(), "b": entry(shape=[1], offsets=[12, 16])}, "leaves a hole"),
        ({"a": entry(offsets=[4, 12])}, "leaves a hole"),
        ({"a": entry("F33")}, "'F33' is not supported"),
        ({"a": entry(["F32"])}, "is not supported"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"__metadata__": []}, "__metadata__"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: Any, what: str) -> None:
    assert what in refusal(raw_file(tmp_path / "model.safetensors", header, bytes(8)))


def test_limits_of_a_header_can_be_moved(tmp_path: Path) -> None:
    path = write_file(tmp_path / "file", {f"t{i}": torch.zeros(1) for i in range(9)})

    assert "more than max_header_bytes=100" in refusal(path, max_header_bytes=100)
    assert "9 tensors, more than max_tensors=8" in refusal(path, max_tensors=8)
    assert len(read_header(path, max_tensors=9).tensors) == 9


def test_a_header_bomb_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    """A sparse file of 4 GB that announces a header of 3 GB."""
    path = raw_file(tmp_path / "file", "{}", length=3 * 10**9)
    with path.open("r+b") as file:
        file.truncate(4 * 10**9)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    assert "more than max_header_bytes" in refusal(path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ('{"a":[' + ",".join(["[]"] * 2_000_000) + "]}", "more than max_tensors=500000"),
        ("{" + ",".join(f'"{i:x}":{{}}' for i in range(600_000)) + "}", "more than max_tensors=500000"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "deeper"),
        ('{"a":' + "9" * 10**6 + "}", "a whole number of 1000000 digits"),
    ],
    ids=["lists", "entries", "depth", "digits"],
)
def test_a_header_of_many_small_things_is_refused_before_they_exist(tmp_path: Path, header: str, what: str) -> None:
    path = raw_file(tmp_path / "file", header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    assert what in refusal(path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_limits_of_a_header_leave_room_for_the_largest_models() -> None:
    """A mixture of experts of a trillion parameters has an index of 9 MB."""
    assert (MAX_HEADER_BYTES, MAX_TENSORS) == (32 * 2**20, 500_000)


def test_types_that_the_format_lacks_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a': torch\.complex128"):
        write_file(tmp_path / "file", {"a": torch.zeros(1, dtype=torch.complex128)})
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("change", ["shorter", "replaced", "touched"])
def test_a_file_that_changed_after_its_header_was_read_is_refused(tmp_path: Path, change: str) -> None:
    """Or the places of one save would be looked up in the numbers of another."""
    path = write_file(tmp_path / "file", {"a": torch.zeros(100)})
    header = read_header(path)
    MappedFile(header)
    if change == "shorter":
        path.write_bytes(path.read_bytes()[:200])
    elif change == "replaced":
        write_file(tmp_path / "other", {"a": torch.ones(100)}).rename(path)
    else:
        os.utime(path, ns=(0, 0))

    with pytest.raises(CorruptCheckpointError, match="changed or replaced"):
        MappedFile(header)
