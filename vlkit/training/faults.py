"""What ends a run early: somebody asks it to stop, a rank dies, a step hangs.

SIGTERM, SIGUSR1, Ctrl-C   the step is finished, the run saved; a second Ctrl-C interrupts at once
a rank dies                the others' next exchange fails: they say at which step, and what to resume from
a step hangs               every rank says what it is doing; after the timeout of the ranks the waiting ones give up
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop and has saved: run it again and it goes on (EX_TEMPFAIL)."""


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGTERM, SIGUSR1 and the first Ctrl-C are noted; the second Ctrl-C interrupts. Outside of the main thread none is."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
    usual = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, _: Any) -> None:
        stop.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in signals:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class Heartbeat:
    """Says what a rank is doing whenever it has been doing it for too long.

    Args:
        say: Takes a line.
        seconds: How long something may take before it is said.
        name: Of the rank, before every line.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, say: Callable[[str], object], seconds: float, name: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._seconds, self._name, self._clock = say, seconds, name, clock
        self._doing, self._since = "starting", clock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def now(self, doing: str) -> None:
        """From here on this is what the rank does."""
        self._doing, self._since = doing, self._clock()

    def look(self) -> str | None:
        """The line, if what the rank does takes long."""
        doing, took = self._doing, self._clock() - self._since
        return f"{self._name}: {doing} for {took:.0f} s" if took >= self._seconds else None

    def _watch(self) -> None:
        while not self._done.wait(min(self._seconds, threading.TIMEOUT_MAX)):
            if line := self.look():
                self._say(line)
