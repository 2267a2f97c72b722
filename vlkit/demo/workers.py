"""A second core that helps: other processes see the same weights and add their gradients.

main    weights (shared memory) --------------------------> its share of the strips -> gradients --+
worker  the same weights, its own strips -> gradients -> shared memory ----------------------------+-> mean -> step

Small matrices gain nothing from more threads in one process; two processes with one thread each learn from nearly twice
the strips. Every worker makes its own strips too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.multiprocessing
from torch import Tensor

from vlkit.errors import VlkitError
from vlkit.models import VisionLanguageModel
from vlkit.processing import Processor, ProcessorConfig

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


class Share(NamedTuple):
    """What one process learned from its strips in one step.

    Attributes:
        loss: Mean over its answers' tokens, in nats.
        tokens: That went through its decoder.
        load: Tokens per expert, one tensor per MoE layer.
    """

    loss: float
    tokens: int
    load: list[Tensor]


def learn(model: VisionLanguageModel, batch: object) -> Share:
    """Add the gradients of a batch to the model's."""
    out = model(batch)
    out.loss.backward()
    load = [] if out.expert_load is None else list(out.expert_load)
    return Share(float(out.loss.detach()), batch.ids.layout.num_tokens, load)  # type: ignore[attr-defined]


class Workers:
    """Other processes that compute gradients of the same weights. The weights move to shared memory.

    Args:
        model: Whose weights; only this process may change them, between `collect` and `begin`.
        count: How many besides this process; may be 0.
        batch_size: Strips per worker and step.
        seed: Of their strips; each worker draws others.
    """

    def __init__(
        self, model: VisionLanguageModel, processor: Processor, count: int, batch_size: int, seed: int
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._grads: list[list[Tensor]] = []
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        if not count:
            return
        model.share_memory()
        context = torch.multiprocessing.get_context("spawn")
        for index in range(1, count + 1):
            grads = [torch.zeros_like(p, requires_grad=False).share_memory_() for p in self._parameters]
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, model, processor.config, grads, batch_size, (seed, index)),
                daemon=True,
                name=f"vlkit-demo-worker-{index}",
            )
            with _deaf_to_interrupts():
                process.start()
            theirs.close()
            self._grads.append(grads)
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Workers:
        for pipe in self._pipes:
            self._receive(pipe)  # each says when it is ready
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(5)
            if process.is_alive():
                process.terminate()
                process.join()

    def begin(self, longest: int) -> None:
        """Let all workers compute gradients on strips of at most so many digits."""
        for pipe in self._pipes:
            pipe.send(longest)

    def collect(self) -> list[Share]:
        """Wait for all workers, and make the gradients of this process the mean over all processes."""
        shares = [self._receive(pipe) for pipe in self._pipes]
        if not shares:
            return []
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                for grads in self._grads:
                    parameter.grad += grads[place]
                parameter.grad /= len(shares) + 1
        return shares

    def _receive(self, pipe: Connection) -> Share:
        try:
            told = pipe.recv()
        except EOFError:
            raise VlkitError("a worker process ended unexpectedly; `--workers 1` learns without one") from None
        if isinstance(told, BaseException):
            raise told
        return told


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """A process started inside ignores Ctrl-C from its first moment: it is for the main process, which ends the workers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _work(
    pipe: Connection,
    model: VisionLanguageModel,
    processor: ProcessorConfig,
    grads: list[Tensor],
    batch_size: int,
    seed: tuple[int, int],
) -> None:
    """The life of a worker: strips, gradients, and again, until it is told None."""
    from vlkit.demo.train import BatchMaker

    torch.set_num_threads(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    try:
        with BatchMaker(Processor(processor), batch_size, seed) as batches:
            pipe.send(None)
            while (longest := pipe.recv()) is not None:
                model.zero_grad(set_to_none=True)
                share = learn(model, batches.next(longest))
                for kept, parameter in zip(grads, parameters, strict=True):
                    if parameter.grad is None:
                        kept.zero_()
                    else:
                        kept.copy_(parameter.grad)
                pipe.send(share)
    except EOFError:
        return  # the main process is gone
    except BaseException as error:
        pipe.send(VlkitError(f"a worker process failed: {type(error).__name__}: {error}"))


def processes_for(wanted: int) -> int:
    """Processes that learn together: as asked, or for 0 two where this machine lets two run at once."""
    if wanted:
        return wanted
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, available)
