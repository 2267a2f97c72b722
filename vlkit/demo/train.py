"""Training for a given time: strips made ahead in a thread, a learning rate that follows the clock, looks at unseen writers.

make_strips -> StripPacker -> queue -> model(batch).loss -> Muon -> history
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from vlkit.demo.digits import load_digits
from vlkit.demo.report import Check, Step
from vlkit.demo.strips import MAX_DIGITS, Strip, Variation, make_strips
from vlkit.demo.task import StripPacker, picture, read
from vlkit.demo.workers import Workers, learn
from vlkit.layers.moe import Router
from vlkit.models import VisionLanguageModel
from vlkit.optim import Muon, muon_param_groups, warmup_decay
from vlkit.packing import Batch
from vlkit.processing import Processor

LEARNING_RATES = {"muon": 0.007, "adamw": 0.001}
VECTOR_RATE = 0.4  # AdamW's rate inside Muon, for embeddings, tables and norms: relative to the matrices'
WARMUP, DECAY = 0.03, 0.7  # shares of the time
GROWTH = 0.4  # share of the time until strips have reached their full length
BALANCE_RATE = 0.003  # per step, on the selection bias of routers
CHECK_EVERY = 0.08  # share of the time between looks at unseen writers
CHECK_STRIPS = 100


@dataclass
class History:
    """What happened in training.

    Attributes:
        steps: One entry per step.
        checks: Looks at strips of unseen writers.
        tokens: Tokens that went through the decoder.
        stopped: Whether it was stopped by hand.
    """

    steps: list[Step] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tokens: int = 0
    stopped: bool = False


class Progress(Protocol):
    """What the training tells while it runs."""

    def update(self, history: History, *, done: float, left: float) -> None: ...


def train(
    model: VisionLanguageModel,
    processor: Processor,
    *,
    seconds: float,
    batch_size: int = 64,
    workers: int = 1,
    optimizer: Literal["muon", "adamw"] = "muon",
    lr: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> History:
    """Train until the time is over or somebody presses Ctrl-C.

    Strips begin with one digit and grow to five. The looks at unseen writers count as training time.

    Args:
        seconds: Of the clock; it starts when all workers are ready.
        batch_size: Strips per step, over all workers.
        workers: Processes that learn together, this one included.
        clock: Tells the time, in seconds.
    """
    rate = LEARNING_RATES[optimizer] if lr is None else lr
    rule = make_optimizer(model, optimizer, rate)
    peaks = [group["lr"] for group in rule.param_groups]
    routers = [module for module in model.modules() if isinstance(module, Router) and module.bias is not None]
    probe = make_strips(load_digits("unseen"), CHECK_STRIPS, seed=(seed, 1))
    history = History()
    samples = 0
    model.train()
    next_check = CHECK_EVERY
    own = -(-batch_size // workers)
    with (
        stop_on_interrupt() as stop,
        Workers(model, processor, workers - 1, own, seed) as others,
        BatchMaker(processor, own, (seed, 0)) as batches,
    ):
        start = clock()
        while (done := (clock() - start) / seconds) < 1 and not stop.is_set():
            factor = rate_factor(done)
            for group, peak in zip(rule.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            others.begin(longest_strip(done))
            shares = [learn(model, batches.next(longest_strip(done)))]
            shares += others.collect()
            rule.step()
            rule.zero_grad(set_to_none=True)
            balance(routers, [sum(load[1:], load[0]) for load in zip(*(share.load for share in shares), strict=True)])
            samples += own * workers
            history.tokens += sum(share.tokens for share in shares)
            loss = sum(share.loss for share in shares) / workers
            history.steps.append(Step(clock() - start, samples, loss, rate * factor))
            if done >= next_check:
                next_check += CHECK_EVERY
                history.checks.append(_check(model, processor, probe, clock() - start))
            if progress is not None:
                elapsed = clock() - start
                progress.update(history, done=elapsed / seconds, left=max(seconds - elapsed, 0.0))
        history.stopped = stop.is_set()
    history.checks.append(_check(model, processor, probe, clock() - start))
    return history


def _check(model: VisionLanguageModel, processor: Processor, strips: list[Strip], seconds: float) -> Check:
    model.eval()
    answers = read(model, processor, [picture(strip) for strip in strips])
    model.train()
    return Check(seconds, sum(a == s.text for a, s in zip(answers, strips, strict=True)) / len(strips))


def make_optimizer(model: VisionLanguageModel, name: Literal["muon", "adamw"], lr: float) -> torch.optim.Optimizer:
    """Muon with its own AdamW for what is no matrix, or AdamW for all."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    groups = muon_param_groups(model)
    for group in groups:
        if group["algorithm"] == "adamw":
            group["lr"] = VECTOR_RATE * lr
    return Muon(groups, lr=lr, weight_decay=0.05)


def rate_factor(done: float) -> float:
    """The factor on the learning rate after a share of the time; it reaches zero at the end."""
    grain = 10_000
    return warmup_decay(
        min(int(done * grain), grain), total=grain, warmup=int(WARMUP * grain), decay=int(DECAY * grain), shape="linear"
    )


def longest_strip(done: float) -> int:
    """Digits of the longest strips after a share of the time."""
    return min(1 + int(MAX_DIGITS * done / GROWTH), MAX_DIGITS)


@torch.no_grad()
def balance(routers: list[Router], loads: list[Tensor]) -> None:
    """Make busy experts a little less likely to be chosen, and idle ones more.

    Args:
        loads: Tokens per expert, one tensor per router.

    Source: Auxiliary-loss-free load balancing, arXiv:2408.15664, as DeepSeek-V3 and Moonlight use it.
    """
    if not routers:
        return
    for router, load in zip(routers, loads, strict=True):
        assert router.bias is not None
        router.bias += BALANCE_RATE * (load.float().mean() - load).sign()


class BatchMaker:
    """Makes the next batches while the model learns from this one.

    Batch number n depends on the seed, n and its longest strip alone.
    """

    def __init__(self, processor: Processor, batch_size: int, seed: tuple[int, int], *, ahead: int = 3) -> None:
        self._pack = StripPacker(processor)
        self._digits = load_digits("seen")
        self._batch_size, self._seed = batch_size, seed
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(ahead)
        self._longest = 1
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="strips", daemon=True)

    def __enter__(self) -> BatchMaker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        while self._thread.is_alive():  # it may be waiting for a place in the queue
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def next(self, longest: int) -> Batch:
        """The next batch; `longest` holds for those not yet begun."""
        self._longest = longest
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def make(self, number: int, longest: int) -> Batch:
        strips = make_strips(
            self._digits, self._batch_size, seed=(*self._seed, 0, number), variation=Variation(), max_digits=longest
        )
        return self._pack(strips)

    def _work(self) -> None:
        number = 0
        try:
            while not self._done.is_set():
                self._ready.put(self.make(number, self._longest))
                number += 1
        except BaseException as error:
            self._ready.put(error)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, the second interrupts as usual. Outside the main thread Ctrl-C is left alone."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)
