"""What a person sees while the model learns: one line that changes in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from vlkit.demo.train import History

REFRESH = 0.2  # seconds between two looks of the line
PLAIN_LINES = 10  # over the whole time
RECENT = 20  # steps that loss and speed are averaged over
BAR = 22  # characters


class ProgressLine:
    """Loss, speed, time left and the last look at unseen writers.

    Args:
        stream: Where to; a terminal gets a line that is rewritten.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._shown = -1.0
        self._plain = 0
        self._recent: list[tuple[float, int, int]] = []  # (moment, samples, tokens), oldest first

    def update(self, history: History, *, done: float, left: float) -> None:
        """Called after every step; shows something when it is time."""
        now = time.perf_counter()
        self._recent = [*self._recent[-RECENT:], (now, history.steps[-1].samples, history.tokens)]
        if self.live:
            if now - self._shown >= REFRESH:
                self._shown = now
                self._rewrite(self._text(history, done, left))
        elif int(done * PLAIN_LINES) >= self._plain:
            self._plain = int(done * PLAIN_LINES) + 1
            print(
                f"{100 * min(done, 1):3.0f}%  {self._text(history, done, left, bar=False)}",
                file=self.stream,
                flush=True,
            )

    def finish(self) -> None:
        """Leave the line as it is and go on below it."""
        if self.live and self._shown >= 0:
            print(file=self.stream, flush=True)

    def _text(self, history: History, done: float, left: float, *, bar: bool = True) -> str:
        recent = history.steps[-RECENT:]
        loss = sum(step.loss for step in recent) / len(recent)
        (start, samples, tokens), (end, more_samples, more_tokens) = self._recent[0], self._recent[-1]
        seen = f"unseen writers {100 * history.checks[-1].exact:.0f}%" if history.checks else "unseen writers -"
        parts = [f"{_clock(left)} left", f"loss {loss:.3f}", seen]
        if end > start:
            parts.append(f"{(more_samples - samples) / (end - start):.0f} strips/s")
            parts.append(f"{(more_tokens - tokens) / (end - start):,.0f} tokens/s")
        text = "  ".join(parts)
        if not bar:
            return text
        width = min(max(self._columns() - len(text) - 9, 0), BAR)
        full = min(max(done, 0.0), 1.0) * width
        blocks = "█" * int(full) + (" ▏▎▍▌▋▊▉"[int(full % 1 * 8)] if full < width else "")
        return f"{100 * min(done, 1):3.0f}% ▕{blocks:<{width}}▏ {text}"

    def _columns(self) -> int:
        return max(shutil.get_terminal_size().columns - 1, 20)

    def _rewrite(self, text: str) -> None:
        width = self._columns()
        self.stream.write("\r" + text[:width].ljust(width))
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
