"""Sharded models that are drawn, read and saved without being whole anywhere."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import all_of, run_ranks
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every family, and one whose file is cut short."""
    found = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        make(name, torch.float32).save_pretrained(found / name, max_shard_size="64KB")
    make("kimi-vl-tiny", torch.float32).save_pretrained(found / "broken")
    weights = found / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return found


@pytest.fixture(scope="module")
def on_ranks(folder: Path) -> dict[int, list[list[Any]]]:
    """Number of ranks -> what each work gives on each rank."""
    works: dict[int, list[tuple[Callable[..., Any], tuple[Any, ...]]]] = {
        2: [
            (drawn, (FAMILIES, {})),
            (there_and_back, (folder, FAMILIES, {})),
            (bytes_read, (folder, ("kimi-vl-tiny", "qwen2.5-vl-tiny"))),
            (failing, (folder,)),
            (frozen, ()),
        ],
        4: [
            (drawn, (["kimi-vl-tiny"], {"expert_parallel": 2})),
            (there_and_back, (folder, ["kimi-vl-tiny"], {"expert_parallel": 2})),
        ],
    }
    return {n: [list(each) for each in zip(*run_ranks(all_of, n, works[n]), strict=True)] for n in works}


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


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_drawn_shares_are_those_of_one_process(num_ranks: int, on_ranks: dict[int, list[list[Any]]]) -> None:
    """And the random state afterwards too; at no time is more whole than the largest tensor."""
    for found in on_ranks[num_ranks][0]:
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
        save_sharded(ours, folder / f"{name}-over-{dist.get_world_size()}", max_shard_size="64KB")
        state = gather_model(ours)
        whole = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        gathered = all(torch.equal(state[key], value) for key, value in whole.items()) if rank == 0 else not state
        found.append((name, same_shares(ours, theirs), gathered))
        dist.barrier()
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_shares_are_read_from_a_folder_and_saved_as_one_process_does(
    num_ranks: int, folder: Path, on_ranks: dict[int, list[list[Any]]]
) -> None:
    for found in on_ranks[num_ranks][1]:
        for name, read, gathered in found:
            assert read, name
            assert gathered, name
    for name, *_ in on_ranks[num_ranks][1][0]:
        again = folder / f"{name}-over-{num_ranks}"
        files = sorted(path.name for path in (folder / name).iterdir())
        assert files == sorted(path.name for path in again.iterdir())
        assert len(files) > 3
        _, differ, odd = filecmp.cmpfiles(folder / name, again, files, shallow=False)
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


def bytes_read(rank: int, folder: Path, names: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """Bytes of the files that this rank looks at, of its shares, and of all."""
    found, opening = [], MappedFile.__init__
    for name in names:
        count = BytesRead()

        def opened(self: MappedFile, header: Header, count: BytesRead = count) -> None:
            opening(self, header)
            count.opened(self)

        MappedFile.__init__ = opened  # type: ignore[method-assign]
        try:
            with count:
                model = load_sharded(folder / name, make_mesh(), check_finite=False)
        finally:
            MappedFile.__init__ = opening  # type: ignore[method-assign]
        tensors = [*model.parameters(), *model.buffers()]
        found.append((count.total, sum(held_of(t)[0].nbytes for t in tensors), sum(t.nbytes for t in tensors)))
    return found


def test_a_rank_reads_its_shares_and_no_more(on_ranks: dict[int, list[list[Any]]]) -> None:
    for found in on_ranks[2][2]:
        for read, share, whole in found:
            assert whole * 0.45 < share < whole * 0.55
            assert share == read


def failing(rank: int, folder: Path) -> list[str]:
    said = []
    torch.manual_seed(rank)
    with pytest.raises(RankError) as seeds:
        load_sharded("kimi-vl-tiny")
    said.append(str(seeds.value))
    with pytest.raises(CorruptCheckpointError) as broken:
        load_sharded(folder / "broken")
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
        save_sharded(model, folder / "broken" / "config.json", check_finite=False)
    said.append(str(denied.value))
    return said


def test_what_fails_on_one_rank_is_raised_on_all(folder: Path, on_ranks: dict[int, list[list[Any]]]) -> None:
    for seeds, broken, odd, denied in on_ranks[2][3]:
        assert "torch.manual_seed" in seeds
        assert "truncated" in broken
        assert "lm_head.weight" in odd
        assert "is a file" in denied
    assert not (folder / "odd").exists()


def frozen(rank: int) -> tuple[bool, bool]:
    model = load_sharded("kimi-vl-tiny", prepare=lambda m: m.vision.requires_grad_(False))
    backward(model, shares(model, 2, step=0)[rank], 1.0)
    kept = all(p.grad is None and is_dtensor(p) for p in model.vision.parameters())
    return kept, all(p.grad is not None for p in model.llm.parameters())


def test_parts_can_be_frozen_before_they_are_sharded(on_ranks: dict[int, list[list[Any]]]) -> None:
    assert on_ranks[2][4] == [(True, True)] * 2
