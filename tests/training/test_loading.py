"""Sharded models that are drawn, read and saved without being whole anywhere."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import run_ranks
from tests.training.steps import backward, make, shares
from vlkit.errors import ConfigError, CorruptCheckpointError, NonFiniteWeightsError, RankError
from vlkit.hub.safetensors_file import Header, MappedFile
from vlkit.models import VisionLanguageModel
from vlkit.models.factory import create_model
from vlkit.models.pretrained import from_pretrained
from vlkit.optim.parts import is_dtensor
from vlkit.registry import list_models
from vlkit.training.gathering import gather_model, save_sharded
from vlkit.training.loading import allocate_shards, draw_shards, held_of
from vlkit.training.sharding import load_sharded, make_mesh, shard_model

FAMILIES = list_models("*-tiny")
OPTIONS: tuple[dict[str, int], ...] = ({}, {"expert_parallel": 2})


def same_shares(ours: VisionLanguageModel, theirs: VisionLanguageModel) -> bool:
    """Whether this rank's shares are those of a whole model, bit for bit."""
    named, wanted = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (ours, theirs))
    assert named.keys() == wanted.keys()
    for name, tensor in named.items():
        local, place = held_of(tensor)
        if not torch.equal(local, wanted[name].detach()[place]):
            return False
    return True


def drawn(rank: int, names: list[str], options: dict[str, int]) -> dict[str, tuple[bool, float, bool]]:
    found = {}
    for name in names:
        theirs = make(name, torch.float32)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        ours = shard_model(create_model(name, device="meta"), make_mesh(**options))
        allocate_shards(ours, "cpu")
        most = draw_shards(ours)
        largest = max(p.numel() * p.itemsize for p in theirs.parameters())
        found[name] = same_shares(ours, theirs), most / largest, torch.equal(state, torch.get_rng_state())
    return found


@pytest.mark.parametrize(
    ("num_ranks", "names", "options"), [(2, FAMILIES, OPTIONS[0]), (4, ["kimi-vl-tiny"], OPTIONS[1])]
)
def test_drawn_shares_are_those_of_one_process(num_ranks: int, names: list[str], options: dict[str, int]) -> None:
    """And the random state afterwards too; at no time is more whole than the largest tensor."""
    for found in run_ranks(drawn, num_ranks, names, options):
        for name, (same, most, state) in found.items():
            assert same, name
            assert most <= 1, name
            assert state, name


def there_and_back(rank: int, folder: Path, names: list[str], options: dict[str, int]) -> list[tuple[str, bool, bool]]:
    found = []
    for name in names:
        theirs = from_pretrained(folder / name, dtype=torch.float32)
        ours = load_sharded(folder / name, make_mesh(**options))
        with torch.no_grad():
            ours(shares(theirs, 1, step=0)[0])  # leaves the root gathered
        save_sharded(ours, folder / f"{name}-again", max_shard_size="64KB")
        state = gather_model(ours)
        whole = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        gathered = all(torch.equal(state[key], value) for key, value in whole.items()) if rank == 0 else not state
        found.append((name, same_shares(ours, theirs), gathered))
        dist.barrier()
    return found


@pytest.mark.parametrize(
    ("num_ranks", "names", "options"), [(2, FAMILIES, OPTIONS[0]), (4, ["kimi-vl-tiny"], OPTIONS[1])]
)
def test_shares_are_read_from_a_folder_and_saved_as_one_process_does(
    num_ranks: int, names: list[str], options: dict[str, int], tmp_path: Path
) -> None:
    for name in names:
        make(name, torch.float32).save_pretrained(tmp_path / name, max_shard_size="64KB")
    for found in run_ranks(there_and_back, num_ranks, tmp_path, names, options):
        for name, read, gathered in found:
            assert read, name
            assert gathered, name
    for name in names:
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == sorted(path.name for path in (tmp_path / f"{name}-again").iterdir())
        assert len(files) > 3
        _, differ, odd = filecmp.cmpfiles(tmp_path / name, tmp_path / f"{name}-again", files, shallow=False)
        assert differ == odd == []


class BytesRead(TorchDispatchMode):
    """Bytes of mapped files that operators look at; views look at none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.files: list[tuple[int, int]] = []  # first address, length

    def opened(self, file: MappedFile) -> None:
        self.files.append((torch.frombuffer(file._map, dtype=torch.uint8).data_ptr(), len(file._map)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args if not func.is_view else ():
            if type(value) is torch.Tensor and not value.is_meta:
                place = value.data_ptr()
                self.total += value.nbytes * any(start <= place < start + size for start, size in self.files)
        return func(*args, **(kwargs or {}))


def bytes_read(rank: int, folder: Path) -> tuple[int, int]:
    """Bytes of the files that this rank looks at, and of its shares."""
    count, opening = BytesRead(), MappedFile.__init__

    def opened(self: MappedFile, header: Header) -> None:
        opening(self, header)
        count.opened(self)

    MappedFile.__init__ = opened  # type: ignore[method-assign]
    with count:
        model = load_sharded(folder, make_mesh(), check_finite=False)
    return count.total, sum(held_of(tensor)[0].nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen2.5-vl-tiny"])
def test_a_rank_reads_its_shares_and_no_more(name: str, tmp_path: Path) -> None:
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    for read, share in run_ranks(bytes_read, 2, tmp_path / "model"):
        assert whole * 0.45 < share < whole * 0.55
        assert share == read


def failing(rank: int, folder: Path) -> list[str]:
    said = []
    torch.manual_seed(rank)
    with pytest.raises(RankError) as seeds:
        load_sharded("kimi-vl-tiny")
    said.append(str(seeds.value))
    with pytest.raises(CorruptCheckpointError) as broken:
        load_sharded(folder)
    said.append(str(broken.value))
    model = shard_model(make("kimi-vl-tiny"), make_mesh())
    with pytest.raises(ConfigError, match="save_sharded"):
        model.save_pretrained(folder / "elsewhere")
    with torch.no_grad():
        if rank == 1:
            held_of(model.llm.lm_head.weight)[0].fill_(float("nan"))
    with pytest.raises(NonFiniteWeightsError) as odd:
        save_sharded(model, folder / "odd")
    said.append(str(odd.value))
    with pytest.raises(OSError) as denied:
        save_sharded(model, folder / "config.json", check_finite=False)
    said.append(str(denied.value))
    return said


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    make("kimi-vl-tiny", torch.float32).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for seeds, broken, odd, denied in run_ranks(failing, 2, tmp_path / "model"):
        assert "torch.manual_seed" in seeds
        assert "truncated" in broken
        assert "lm_head.weight" in odd
        assert "is a file" in denied
    assert not (tmp_path / "model" / "odd").exists()


def frozen(rank: int) -> tuple[bool, bool]:
    model = load_sharded("kimi-vl-tiny", prepare=lambda m: m.vision.requires_grad_(False))
    backward(model, shares(model, 2, step=0)[rank], 1.0)
    kept = all(p.grad is None and is_dtensor(p) for p in model.vision.parameters())
    return kept, all(p.grad is not None for p in model.llm.parameters())


def test_parts_can_be_frozen_before_they_are_sharded() -> None:
    assert run_ranks(frozen, 2) == [(True, True)] * 2
