"""What a step takes: the same for any number of threads and ranks, and after a resume."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.training.samples import write_samples
from vlkit.errors import ConfigError, ImageError, SampleError, SequenceTooLongError
from vlkit.models.factory import create_processor
from vlkit.packing import Batch
from vlkit.training.mixture import Mixture
from vlkit.training.order import Draw, order
from vlkit.training.reader import Reader, StepShare
from vlkit.training.sources import open_source
from vlkit.training.tasks.task import Item


class Thing(NamedTuple):
    """What a sample becomes here: who it is, its size, and a number drawn for it."""

    stream: int
    index: int
    num_tokens: int
    num_patches: int
    drawn: float
    draw: list[Any]


class Numbers:
    """Samples of random sizes. Some cannot be measured, and of some only preparing fails, as of a truncated image."""

    def __init__(self, stream: int, count: int, *, broken: Iterable[int] = (), truncated: Iterable[int] = ()) -> None:
        rng = np.random.default_rng(stream)
        self.lengths = rng.lognormal(3 + stream, 0.7, count).astype(int).clip(1, 300)
        self.stream, self.broken, self.truncated = stream, set(broken), set(truncated)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise SampleError(f"{self.where(index)}: not JSON")
        return {
            "tokens": int(self.lengths[index]),
            "patches": 4 * (index % 3),
            "who": (self.stream, index),
            "truncated": index in self.truncated,
        }

    def where(self, index: int) -> str:
        return f"{self.stream}.jsonl, line {index + 1}"


def prepare(sample: dict[str, Any], draw: Draw) -> Thing:
    if sample["truncated"]:
        raise ImageError("the file ends before the image does")
    return Thing(*sample["who"], sample["tokens"], sample["patches"], float(draw.rng.random()), draw.as_json())


def measure(sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
    draw.rng.random()  # a measure may draw what preparing will draw
    return sample["tokens"], sample["patches"]


WAYS: dict[str, dict[str, Any]] = {
    "samples": {"batch": 7, "micro_tokens": 60, "measure": measure},
    "packs": {"packs": 4, "pack_tokens": 120, "pack_patches": 40, "open_rows": 3, "measure": measure},
}


def reader(way: str, streams: int = 1, **changes: Any) -> Reader[Thing]:
    sources = [Numbers(0, 31, broken=[3], truncated=[8, 9]), Numbers(1, 11, broken=[2])][:streams]
    draws = Mixture([len(each) for each in sources], [0.75, 0.25][:streams], seed=3)
    values = {"skip_corrupt": True, **WAYS[way], **changes}
    return Reader(sources, draws, prepare, **values)


def steps(source: Reader[Thing], begin: int, end: int) -> list[StepShare[Thing]]:
    """Steps of a stage of 20, each begun while the one before is learnt from."""
    return [source.read(step / 20, (step + 1) / 20) for step in range(begin, end)]


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_reader_goes_on_bit_for_bit_with_any_number_of_threads(way: str, streams: int) -> None:
    with reader(way, streams) as plain:
        whole = steps(plain, 0, 20)
    for before, after in ((0, 2), (2, 0), (1, 2)):
        with reader(way, streams, workers=before) as first:
            begun = steps(first, 0, 10)
            state = json.dumps(first.state_dict())
        with reader(way, streams, workers=after) as second:
            second.load_state_dict(json.loads(state))
            assert json.dumps(second.state_dict()) == state
            assert begun + steps(second, 10, 20) == whole
    items = [item for share in whole for item in share.items]
    assert len({item.drawn for item in items}) > 50
    assert all(item.drawn == Draw(*item.draw).rng.random() for item in items), "measuring does not take its numbers"


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_divide_the_same_steps(way: str, streams: int) -> None:
    with reader(way, streams) as alone:
        whole = steps(alone, 0, 6)
        place = alone.state_dict()
    for num_ranks in (2, 3):
        readers = [reader(way, streams, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        parts = list(zip(*(steps(each, 0, 6) for each in readers), strict=True))
        assert all(each.state_dict() == place for each in readers)
        for share, ranks in zip(whole, parts, strict=True):
            assert sorted(share.items) == sorted(item for part in ranks for item in part.items)
            assert share.samples == sum(part.samples for part in ranks)
            assert share.corrupt == sum(part.corrupt for part in ranks)
            assert {part.plan for part in ranks} == {share.plan}
            if way == "packs":
                assert share.packs == tuple(pack for part in ranks for pack in part.packs)


def test_steps_of_samples_take_the_order_of_earlier_versions() -> None:
    with reader("samples") as source:
        taken = [sorted(item.index for item in share.items) for share in steps(source, 0, 9)]
    for step, indices in enumerate(taken):
        planned = order(31, range(7 * step, 7 * step + 7), seed=3)
        assert indices == sorted(set(planned) - {3, 8, 9})


def test_packs_keep_the_budget_lose_nothing_and_say_their_fill() -> None:
    with reader("packs", pack_tokens=120) as source:
        shares = steps(source, 0, 20)
        waiting = [key for row in source.state_dict()["packer"]["rows"] for key in row["keys"]]
        packs = [pack for share in shares for pack in share.packs]
    for pack in packs:
        assert sum(item.num_patches for item in pack) <= 40
        assert sum(item.num_tokens for item in pack) <= 120 or len(pack) == 1
    taken = [item.index for pack in packs for item in pack] + [key[1] for key in waiting if key[1] not in (8, 9)]
    count = sum(share.samples for share in shares) + len(waiting)
    assert sorted(taken) == sorted(i for i in order(31, range(count), seed=3) if i not in (3, 8, 9))
    fill = shares[0].fill
    assert fill.tokens == sum(item.num_tokens for item in shares[0].items)
    assert (fill.packs, fill.token_budget, fill.patch_budget) == (4, 480, 160)


def test_a_truncated_image_leaves_its_pack_and_no_other() -> None:
    """It can be measured: the plan holds it, and its pack goes on without it."""
    with reader("packs") as broken:
        found = steps(broken, 0, 10)
    source = Numbers(0, 31, broken=[3])
    with Reader([source], Mixture([31], seed=3), prepare, skip_corrupt=True, **WAYS["packs"]) as whole:
        expected = steps(whole, 0, 10)
    for ours, theirs in zip(found, expected, strict=True):
        kept = [tuple(item for item in pack if item.index not in (8, 9)) for pack in theirs.packs]
        assert ours.packs == tuple(pack for pack in kept if pack)
        assert ours.corrupt - theirs.corrupt == len(theirs.items) - len(ours.items)
        assert ours.samples == theirs.samples
        assert ours.plan == theirs.plan
    assert sum(share.corrupt for share in found) > sum(share.corrupt for share in expected) > 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_a_sample_that_cannot_be_used_is_refused_by_name(way: str, workers: int) -> None:
    def choosy(sample: dict[str, Any], draw: Draw) -> Thing:
        """An error of the task, which does not know the file."""
        if draw.index == 5:
            raise SampleError("a pair is expected")
        return prepare(sample, draw)

    for broken, message in (
        ({"broken": [5]}, "not JSON"),
        ({"truncated": [5]}, "the file ends"),
        ({}, "a pair is expected"),
    ):
        source = Numbers(0, 31, **broken)  # type: ignore[arg-type]
        with (
            Reader(
                [source], Mixture([31], seed=3), prepare if broken else choosy, workers=workers, **WAYS[way]
            ) as found,
            pytest.raises(SampleError, match=rf"^0\.jsonl, line 6: {message}"),
        ):
            steps(found, 0, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_step_does_not_move_the_place(workers: int) -> None:
    source = Numbers(0, 31, truncated=[5])
    with Reader([source], Mixture([31], seed=3), prepare, workers=workers, **WAYS["packs"]) as found:
        done = 0
        for step in itertools.count():
            try:
                found.read(step / 20, (step + 1) / 20)
            except SampleError:
                done = step
                break
        place = json.dumps(found.state_dict())
        with pytest.raises(SampleError):
            found.read(done / 20)
        assert json.dumps(found.state_dict()) == place
        source.truncated.clear()
        again = found.read(done / 20)
    with Reader([source], Mixture([31], seed=3), prepare, **WAYS["packs"]) as plain:
        assert again == steps(plain, 0, done + 1)[done]


def test_a_progress_that_was_not_announced_is_answered_rightly() -> None:
    with reader("packs", 2, workers=2) as ahead, reader("packs", 2) as plain:
        for progress, upcoming in ((0.0, 0.5), (0.25, 0.5), (0.5, None), (0.75, 1.0)):
            assert ahead.read(progress, upcoming) == plain.read(progress)


@pytest.mark.parametrize("way", WAYS)
def test_samples_that_are_too_long_are_refused_or_left_out(way: str) -> None:
    """Whatever happens to those that cannot be used for other reasons."""

    def checked(make: Any) -> Any:
        def made(sample: dict[str, Any], draw: Draw) -> Any:
            if sample["tokens"] > 40:
                raise SequenceTooLongError(f"{sample['tokens']} tokens, more than 40")
            return make(sample, draw)

        return made

    source, values = Numbers(0, 31), {**WAYS[way], "measure": checked(measure)}

    def shares(**options: Any) -> list[StepShare[Thing]]:
        with Reader([source], Mixture([31], seed=3), checked(prepare), **values, **options) as found:
            return steps(found, 0, 20)

    with pytest.raises(SampleError, match=r"0\.jsonl, line \d+: \d+ tokens, more than 40"):
        shares()
    kept = shares(skip_long=True)
    assert kept == shares(skip_corrupt=True)
    assert max(item.num_tokens for share in kept for item in share.items) <= 40
    assert sum(share.corrupt for share in kept) > 0
    source.truncated.add(int(source.lengths.argmin()))
    with pytest.raises(SampleError, match="the file ends before"):
        shares(skip_long=True)


def test_packs_without_a_usable_sample_end_in_an_error() -> None:
    source = Numbers(0, 5, broken=range(5))
    with (
        Reader([source], Mixture([5]), prepare, skip_corrupt=True, **WAYS["packs"]) as found,
        pytest.raises(
            SampleError, match=r"10 samples in a row cannot be used; one of them is 0\.jsonl, line \d: not JSON$"
        ),
    ):
        found.read(0.0)


def test_one_usable_sample_is_enough() -> None:
    """It may be the first of an epoch and the last of the next one, and a pack needs many of it."""
    sources = [Numbers(0, 4, broken=[0, 1, 3])]
    with Reader(sources, Mixture([4]), prepare, skip_corrupt=True, **WAYS["packs"]) as found:
        share = found.read(0.0)
    assert {item.index for item in share.items} == {2}
    assert share.corrupt > 2 * 4


def test_a_pack_without_a_usable_sample_is_not_there() -> None:
    source = Numbers(0, 31, truncated=range(31))
    with Reader([source], Mixture([31]), prepare, skip_corrupt=True, **WAYS["packs"]) as found:
        share = found.read(0.0)
    assert (share.packs, share.fill.packs) == ((), 0)
    assert share.samples == share.corrupt > 0


@pytest.mark.parametrize(("cost", "message"), [((1, 99), "1 tokens and 99"), ((999, 0), "999 tokens and 0")])
def test_a_measure_that_is_too_small_is_an_error(cost: tuple[int, int], message: str) -> None:
    ways = {**WAYS["packs"], "measure": lambda sample, draw: cost}
    with (
        Reader([Numbers(0, 31)], Mixture([31]), prepare, **ways) as found,
        pytest.raises(SampleError, match=f"measured as {message} patches, but it has"),
    ):
        found.read(0.0)


@pytest.mark.parametrize("way", WAYS)
def test_streams_get_their_share_of_the_tokens_of_all_steps(way: str) -> None:
    """Samples that cannot be used do not count: 75 % and 25 %, to about one sample of the longest."""
    with reader(way, 2) as source:
        items = [item for share in steps(source, 0, 40) for item in share.items]
    tokens = [sum(item.num_tokens for item in items if item.stream == stream) for stream in (0, 1)]
    assert sum(tokens) > 5000
    assert abs(tokens[1] / sum(tokens) - 0.25) < 0.03


def test_without_a_measure_samples_are_measured_by_preparing_them() -> None:
    with reader("packs", 2, measure=None) as slow, reader("packs", 2) as fast:
        slow_shares, fast_shares = steps(slow, 0, 3), steps(fast, 0, 3)
    assert {item.index for share in slow_shares for item in share.items if item.stream == 0}.isdisjoint({3, 8, 9})
    assert [share.fill.token_budget for share in slow_shares] == [share.fill.token_budget for share in fast_shares]


class Harder:
    """Draws the sample after the last one that went well: what it will draw next is known when a step has ended."""

    needs_tokens, needs_outcome = False, True

    def __init__(self) -> None:
        self.place, self.asked = 0, 0

    def next(self, progress: float) -> Draw:
        self.asked += 1
        return Draw(0, self.place % 31, 0, progress)

    def told(self, draw: Draw, tokens: int) -> None: ...

    def went_well(self) -> None:
        self.place += 1

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def test_draws_that_depend_on_outcomes_are_never_made_ahead() -> None:
    draws, source = Harder(), Numbers(0, 31)
    with Reader([source], draws, prepare, batch=2, workers=2) as found:
        for step in range(4):
            share = found.read(step / 4, (step + 1) / 4)
            assert draws.asked == 2 * (step + 1)
            assert [item.index for item in share.items] == [step, step]
            draws.went_well()
            assert found.state_dict() == {"draws": {"place": step + 1}}
        source.truncated.add(4)
        with pytest.raises(SampleError):
            found.read(1.0)
        assert found.state_dict() == {"draws": {"place": 4}}


def test_threads_end_with_the_reader() -> None:
    before = threading.active_count()
    with reader("packs", 2, workers=2) as found:
        steps(found, 0, 2)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_a_place_of_steps_made_in_another_way_is_refused() -> None:
    with reader("packs") as packs, reader("samples") as samples:
        with pytest.raises(ConfigError, match="place is of steps of packs, these are steps of samples"):
            samples.load_state_dict(packs.state_dict())
        with pytest.raises(ConfigError, match="place is of steps of samples, these are steps of packs"):
            packs.load_state_dict(samples.state_dict())


def test_a_step_is_either_samples_or_packs() -> None:
    for wrong in ({}, {"batch": 2, "packs": 2, "pack_tokens": 9}, {"packs": 2}, {"batch": 2, "pack_tokens": 9}):
        with pytest.raises(ConfigError, match=r"give one of the two|need pack_tokens"):
            Reader([Numbers(0, 5)], Mixture([5]), prepare, **wrong)


def test_a_truncated_image_can_be_measured_but_not_read(tmp_path: Path) -> None:
    """With a real processor: the measure is what preparing gives, and only what cannot be read is missing."""
    lines = write_samples(tmp_path)
    processor = create_processor("kimi-vl-tiny")
    picture = tmp_path / "4.png"
    picture.write_bytes(picture.read_bytes()[:-400])

    def written(sample: dict[str, Any], draw: Draw) -> Item:
        return Item(processor(sample["messages"], labels=True), {"index": draw.index})

    def measured(sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        return processor.measure(sample["messages"], labels=True)

    source = open_source(lines)
    draws = Mixture([13], seed=0)
    ways: dict[str, Any] = {
        "packs": 3,
        "pack_tokens": 300,
        "pack_patches": 300,
        "open_rows": 4,
        "measure": measured,
        "workers": 2,
    }
    with Reader([source], draws, written, skip_corrupt=True, **ways) as found:
        shares = [found.read(0.0, 0.0) for _ in range(6)]
    indices = [item.extra["index"] for share in shares for item in share.items]
    assert set(indices) == set(range(13)) - {4}
    for share in shares:
        for pack in share.packs:
            joined = Batch.concat([item.batch for item in pack])
            assert joined.ids.layout.num_tokens <= 300
            assert joined.patches is None or joined.patches.layout.num_tokens <= 300
    with (
        Reader([source], Mixture([13]), written, **ways) as strict,
        pytest.raises(SampleError, match=r"line 5: .*4\.png"),
    ):
        steps(strict, 0, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"messages": []}', "must be a list of messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant"}]}', "message 1"),
    ],
)
def test_what_is_wrong_with_a_sample_on_disk_is_said_or_counted(tmp_path: Path, text: str, message: str) -> None:
    good = [{"role": "user", "content": "z"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": good}) + "\n" + text + "\n")
    source, processor = open_source(tmp_path / "a.jsonl"), create_processor("kimi-vl-tiny")

    def written(sample: dict[str, Any], draw: Draw) -> Item:
        return Item(processor(sample["messages"], labels=True))

    with pytest.raises(SampleError, match=rf"a\.jsonl.*line 2.*{message}"):
        Reader([source], Mixture([2]), written, batch=2).read(0.0)
    share = Reader([source], Mixture([2]), written, batch=2, skip_corrupt=True).read(0.0)
    assert (share.samples, share.corrupt, len(share.items)) == (2, 1, 1)
