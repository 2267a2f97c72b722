"""Tensors that some ranks write and others read: the same bits, or a refusal before anything is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.ranks import run_ranks
from vlkit.errors import CheckpointError, CorruptCheckpointError, DiskFullError, KeyMismatchError
from vlkit.optim.parts import Box, Part, pieces_of, run_boxes
from vlkit.training.sharded_files import load_shards, save_shards

SHAPES = {"rows": (65, 3), "few": (3, 40), "columns": (7, 10), "stack": (5, 3, 4), "flat": (4, 5, 6), "plain": (6,)}


def whole() -> dict[str, Tensor]:
    """What all ranks hold together: odd sizes, a scalar, an empty tensor, several dtypes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors["few"] = tensors["few"].bfloat16()
    return {
        **tensors,
        "step": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "mask": torch.rand(9, generator=generator) > 0.5,
    }


def spread(rank: int, num_ranks: int, tensors: dict[str, Tensor], rotate: int = 0) -> dict[str, Tensor]:
    """The same tensors in every form that ranks hold them."""
    out: dict[str, Tensor] = dict(tensors)
    numel = tensors["flat"].numel()
    # Runs of unequal length; with rotate, other ranks hold them.
    cuts = [0, *(7 + 29 * i for i in range(num_ranks - 1)), numel]
    place = (rank + rotate) % num_ranks
    start, stop = cuts[place], max(cuts[place], cuts[place + 1])
    out["flat"] = Part(tensors["flat"].flatten()[start:stop].clone(), (4, 5, 6), ((start, stop),))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (num_ranks,))
        for name, axis in (("rows", 0), ("few", 0), ("columns", 1), ("stack", 0)):
            out[name] = distribute_tensor(tensors[name], mesh, [Shard((axis + rotate) % 2)])
    return out


def blank(rank: int, num_ranks: int, rotate: int = 0) -> dict[str, Tensor]:
    return spread(rank, num_ranks, {name: torch.zeros_like(tensor) for name, tensor in whole().items()}, rotate)


def save(rank: int, folder: Path, num_ranks: int) -> None:
    save_shards(folder, spread(rank, num_ranks, whole()))


def load(rank: int, folder: Path, num_ranks: int, rotate: int = 0) -> None:
    found = blank(rank, num_ranks, rotate)
    load_shards(folder, found)
    for name, tensor in spread(rank, num_ranks, whole(), rotate).items():
        for (_, a), (_, b) in zip(pieces_of(found[name]), pieces_of(tensor), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize(("writers", "readers"), [(4, 2), (4, 3), (1, 4), (3, 3), (2, 1)])
def test_any_number_of_ranks_reads_what_another_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    """Also where a tensor was cut along another axis, and runs lie on other ranks."""
    for ranks, work in ((writers, save), (readers, load)):
        if ranks == 1:
            work(0, tmp_path / "state", 1)
        else:
            run_ranks(work, ranks, tmp_path / "state", ranks)
    if readers > 1:
        run_ranks(load, readers, tmp_path / "state", readers, 1)


def save_replicated(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    tensor = distribute_tensor(whole()["rows"], mesh, [Replicate(), Shard(0)])
    save_shards(folder, {"rows": tensor})


def test_what_ranks_hold_alike_is_stored_once(tmp_path: Path) -> None:
    run_ranks(save_replicated, 4, tmp_path)
    target = {"rows": torch.zeros(65, 3)}
    load_shards(tmp_path, target)
    assert torch.equal(target["rows"], whole()["rows"])
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert stored < 65 * 3 * 4 + 4 * 400  # headers


def save_experts(rank: int, folder: Path) -> None:
    """Seven experts over two ranks, and what each has sharded over two others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(torch.arange(7 * 5 * 3.0).view(7, 5, 3), mesh["ep"], [Shard(0)]))
    fully_shard(module, mesh=mesh["dp"])
    save_shards(folder, {"weight": module.weight.detach()})


def test_experts_that_are_sharded_twice_come_out_in_order(tmp_path: Path) -> None:
    run_ranks(save_experts, 4, tmp_path)
    target = {"weight": torch.zeros(7, 5, 3)}
    load_shards(tmp_path, target)
    assert target["weight"].flatten().tolist() == list(range(105))


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_of_a_run_are_its_elements_in_order(shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    tensor = torch.arange(numel).view(shape)
    everything = Box((0,) * len(shape), shape)
    for start in range(numel + 1):
        for stop in range(start, numel + 1):
            boxes = run_boxes(shape, start, stop)
            found = [element for box in boxes for element in box.of(tensor, everything).flatten().tolist()]
            assert found == list(range(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


# Damage


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("shards") / "saved"
    run_ranks(save, 2, folder, 2)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """What two ranks have saved, to be damaged."""
    return Path(shutil.copytree(saved_once, tmp_path / "copy"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def edit(folder: Path, change: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"])
    (folder / "index.json").write_text(json.dumps(index))


SHARD = "shard-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: flip(folder / SHARD, -3), "another checksum"),
        (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9]), "truncated"),
        (lambda folder: (folder / SHARD).unlink(), "missing"),
        (lambda folder: (folder / "index.json").unlink(), "no such file"),
        (lambda folder: (folder / "index.json").write_text("{}"), "version None"),
        (lambda folder: edit(folder, lambda tensors: tensors["rows"]["pieces"].pop()), "have 99 elements.*has 195"),
        (lambda folder: edit(folder, lambda t: t["rows"]["pieces"].append(t["rows"]["pieces"][0])), "or they overlap"),
        (lambda folder: edit(folder, lambda t: t["rows"]["pieces"][0][1].__setitem__(0, 60)), "lies outside"),
        (lambda folder: edit(folder, lambda t: t["rows"]["pieces"][0].__setitem__(0, "../x")), "lies outside"),
        (lambda folder: edit(folder, lambda t: t["rows"].update(pieces=[[1]])), "cannot be understood"),
        (lambda folder: edit(folder, lambda t: t["rows"]["pieces"][0].__setitem__(0, SHARD)), "should be"),
    ],
)
def test_damage_is_named_and_changes_nothing(saved: Path, damage: Any, words: str) -> None:
    damage(saved)
    targets = blank(0, 1)
    with pytest.raises(CorruptCheckpointError, match=words):
        load_shards(saved, targets)
    assert not any(view.any() for tensor in targets.values() for _, view in pieces_of(tensor))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("step"), r"9 tensors, 8 are wanted: missing none; not wanted 1 \('step'\)"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), r"missing 1 \('other'\)"),
        (lambda tensors: tensors.update(rows=torch.zeros(3, 65)), r"'rows' is float32 \[65, 3\].*\[3, 65\]"),
        (lambda tensors: tensors.update(few=torch.zeros(3, 40)), r"'few' is bfloat16.*wanted is float32"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    save_shards(tmp_path, whole())
    targets = {name: torch.zeros_like(tensor) for name, tensor in whole().items()}
    change(targets)
    with pytest.raises(KeyMismatchError, match=words):
        load_shards(tmp_path, targets)
    assert not any(tensor.any() for tensor in targets.values())


def load_a_flipped_shard(rank: int, folder: Path) -> str:
    """Only one rank reads the damaged bytes; both must know."""
    targets = blank(rank, 2)
    try:
        load_shards(folder, targets)
    except CorruptCheckpointError as error:
        assert not any(view.any() for tensor in targets.values() for _, view in pieces_of(tensor))
        return str(error)
    return ""


def test_a_rank_that_meets_damage_stops_all(saved: Path) -> None:
    place = (saved / SHARD).read_bytes().index(whole()["rows"][64].numpy().tobytes())
    flip(saved / SHARD, place)
    first, second = run_ranks(load_a_flipped_shard, 2, saved)
    assert first.startswith("rank 1: ")
    assert "'rows[33:65,0:3]' has another checksum" in second


def save_where_rank_1_has_no_space(rank: int, folder: Path) -> str:
    import errno

    from vlkit.training import sharded_files

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        sharded_files.write_safetensors = full  # type: ignore[assignment]
    try:
        save_shards(folder, spread(rank, 2, whole()))
    except DiskFullError as error:
        return str(error)
    return ""


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_no_index(tmp_path: Path) -> None:
    first, second = run_ranks(save_where_rank_1_has_no_space, 2, tmp_path)
    assert "rank 1: " in first
    assert "No space left" in second
    assert not (tmp_path / "index.json").exists()


def save_different_tensors(rank: int, folder: Path) -> str:
    try:
        save_shards(folder, {"a": torch.zeros(2 + rank)})
    except CheckpointError as error:
        return str(error)
    return ""


def test_ranks_with_different_tensors_are_told(tmp_path: Path) -> None:
    assert all("different models" in words for words in run_ranks(save_different_tensors, 2, tmp_path))


def test_a_folder_with_an_older_save_is_not_mixed_with(tmp_path: Path) -> None:
    save_shards(tmp_path, whole())
    with pytest.raises(CheckpointError, match="File exists"):
        save_shards(tmp_path, whole())


def test_partial_sums_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for words in run_ranks(save_partial_sums, 2, tmp_path):
        assert "redistribute" in words


def save_partial_sums(rank: int, folder: Path) -> str:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    try:
        save_shards(folder, {"a": DTensor.from_local(torch.ones(3), mesh, [Partial()])})
    except ValueError as error:
        return str(error)
    return ""
