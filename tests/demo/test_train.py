"""Training: the schedule follows the clock, data are made ahead, and Ctrl-C ends it gently."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from vlkit.demo.options import Options
from vlkit.demo.run import build_model
from vlkit.demo.strips import MAX_DIGITS
from vlkit.demo.task import image_rule
from vlkit.demo.train import (
    GROWTH,
    BatchMaker,
    History,
    balance,
    longest_strip,
    make_optimizer,
    rate_factor,
    stop_on_interrupt,
    train,
)
from vlkit.layers.moe import Router
from vlkit.processing import Processor, ProcessorConfig

SIZES = {"vision": "moonvit-tiny", "llm": "moonlight-tiny"}


def _processor(patch_size: int = 8) -> Processor:
    return Processor(ProcessorConfig(image=image_rule(patch_size, 2)))


def test_the_rate_rises_stays_and_falls_to_zero_inside_the_time() -> None:
    factors = [rate_factor(i / 1000) for i in range(1001)]
    assert 0 < factors[0] < 0.05
    assert max(factors) == 1.0
    assert factors[-1] == 0.0
    assert factors[999] < 0.01
    peak = factors.index(1.0)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_strips_grow_to_their_full_length() -> None:
    lengths = [longest_strip(i / 100) for i in range(101)]
    assert lengths[0] == 1
    assert lengths == sorted(lengths)
    assert set(lengths) == set(range(1, MAX_DIGITS + 1))
    assert longest_strip(GROWTH) == MAX_DIGITS


def test_the_same_batch_comes_for_the_same_seed_and_number() -> None:
    first, again = (BatchMaker(_processor(), 5, seed=(7, 0)).make(3, 4) for _ in range(2))
    other = BatchMaker(_processor(), 5, seed=(8, 0)).make(3, 4)
    workers = BatchMaker(_processor(), 5, seed=(7, 1)).make(3, 4)
    assert torch.equal(first.ids.tokens, again.ids.tokens)
    assert torch.equal(first.patches.tokens, again.patches.tokens)
    assert not torch.equal(first.ids.tokens, other.ids.tokens)
    assert not torch.equal(first.ids.tokens, workers.ids.tokens)


def test_batches_come_in_order_and_the_thread_ends() -> None:
    maker = BatchMaker(_processor(), 4, seed=(0, 0))
    with maker:
        made = [maker.next(1) for _ in range(5)]
    assert not maker._thread.is_alive()
    assert torch.equal(made[0].patches.tokens, maker.make(0, 1).patches.tokens)
    assert torch.equal(made[4].patches.tokens, maker.make(4, 1).patches.tokens)


def test_a_failure_while_making_data_is_raised_where_data_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BatchMaker, number: int, longest: int) -> None:
        raise RuntimeError("no more paper")

    monkeypatch.setattr(BatchMaker, "make", fail)
    with pytest.raises(RuntimeError, match="no more paper"), BatchMaker(_processor(), 4, seed=(0, 0)) as maker:
        maker.next(1)


def test_busy_experts_become_less_likely_and_idle_ones_more() -> None:
    router = Router(8, 4, top_k=1, selection_bias=True)
    balance([router], [torch.tensor([3, 1, 2, 0])])
    assert router.bias.sign().tolist() == [-1.0, 1.0, -1.0, 1.0]


class StepClock:
    """Time that passes by one second per step, on any machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def update(self, history: History, *, done: float, left: float) -> None:
        self.now = float(len(history.steps))

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_changes_every_part_and_lowers_the_loss(optimizer: str) -> None:
    model = build_model(Options(**SIZES))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clock = StepClock()
    history = train(
        model, _processor(4), seconds=16, batch_size=8, optimizer=optimizer, lr=0.01, progress=clock, clock=clock
    )
    assert len(history.steps) == 16
    assert history.steps[-1].loss < history.steps[0].loss - 0.5
    assert history.steps[-1].samples == 8 * 16
    assert history.steps[-1].rate < history.steps[2].rate == max(step.rate for step in history.steps)
    assert [check.seconds for check in history.checks[-2:]] == [15, 16]
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_muon_takes_the_matrices_and_adamw_the_rest_at_a_lower_rate() -> None:
    groups = make_optimizer(build_model(Options(**SIZES)), "muon", 0.01).param_groups
    assert {group["algorithm"]: group["lr"] for group in groups} == {"muon": 0.01, "adamw": pytest.approx(0.004)}


def test_ctrl_c_ends_the_training_and_keeps_its_history() -> None:
    class Interrupt:
        def update(self, history: History, *, done: float, left: float) -> None:
            if len(history.steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    start = time.perf_counter()
    history = train(build_model(Options(**SIZES)), _processor(4), seconds=60, batch_size=2, progress=Interrupt())
    assert history.stopped
    assert 3 <= len(history.steps) <= 4
    assert time.perf_counter() - start < 20
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt() as stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
