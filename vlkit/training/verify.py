r"""Verifiers: is an answer right? A function of the answer's text and the sample it answers, that gives a reward.

    exact    the text is the sample's "answer"
    number   the last number in the text is the one in the answer
    boxed    the last \boxed{...} holds the answer, as text or as a number

Any function (text, sample) -> number or bool can stand beside them: train(config, verifiers={"mine": function}).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from vlkit.errors import ConfigError, SampleError

Verifier = Callable[[str, Mapping[str, Any]], float | bool]

# 12, -3.5, +7, 1,234,567.8, .5, 2e3 and 3/4; a sign belongs to the number where no digit, letter or bracket stands before it.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_POWER = r"(?:(?<=\d)[eE][-+\u2212]?\d+)?"
_NUMBER = re.compile(
    rf"(?:(?<![\w)\].])[-+\u2212])?{_WHOLE}?(?:\.\d+|(?<=\d)\.?){_POWER}(?:\s?/\s?{_WHOLE}(?:\.\d+)?{_POWER})?"
)
# A model may write 1e999999999, which nobody can hold exactly: what has more digits than these is no number.
_LONGEST = 1000


def exact(text: str, sample: Mapping[str, Any]) -> float:
    """1 if the text is the answer but for spaces around it, else 0."""
    return float(text.strip() == expected(sample).strip())


def number(text: str, sample: Mapping[str, Any]) -> float:
    """1 if the last number in the text has the value of the last one in the answer, else 0.

    Raises:
        SampleError: The sample's answer has no number.
    """
    wanted = last_number(expected(sample))
    if wanted is None:
        raise SampleError(f"the verifier 'number' needs an answer with a number, found {expected(sample)[:80]!r}")
    return float(last_number(text) == wanted)


def boxed(text: str, sample: Mapping[str, Any]) -> float:
    r"""1 if the last \boxed{...} of the text is the answer, or both are the same number, else 0."""
    found, wanted = last_boxed(text), expected(sample)
    wanted = wanted if (inner := last_boxed(wanted)) is None else inner
    if found is None:
        return 0.0
    if _plain(found) == _plain(wanted):
        return 1.0
    values = [_whole_number(each) for each in (found, wanted)]
    return float(values[0] is not None and values[0] == values[1])


VERIFIERS: Mapping[str, Verifier] = {"exact": exact, "number": number, "boxed": boxed}


def find_verifier(name: str, given: Mapping[str, Verifier]) -> Verifier:
    """A verifier by its name: one that was given to the run, or a built-in.

    Raises:
        ConfigError: There is none of this name.
    """
    known = {**VERIFIERS, **given}
    if name not in known:
        raise ConfigError(
            f"there is no verifier {name!r}; there are {', '.join(known)}. Others are given as train(..., verifiers={{...}})"
        )
    return known[name]


def judged(verifier: Verifier, text: str, sample: Mapping[str, Any]) -> float:
    """The reward of an answer.

    Raises:
        ConfigError: The verifier gives something else than a finite number.
    """
    found = verifier(text, sample)
    reward = found.item() if isinstance(found, np.generic | np.ndarray | Tensor) and found.ndim == 0 else found
    if isinstance(reward, int) and abs(reward) > sys.float_info.max:
        reward = math.inf
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ConfigError(f"a verifier gives a finite number, or True or False; found {reward!r:.80} for {text[:80]!r}")
    return float(reward)


def expected(sample: Mapping[str, Any]) -> str:
    """What the sample holds as right.

    Raises:
        SampleError: Nothing.
    """
    answer = sample.get("answer")
    if not isinstance(answer, str):
        raise SampleError(f"a question with an 'answer' is expected, found {answer!r}")
    return answer


def last_number(text: str) -> Fraction | None:
    """The value of the last number in a text; thousands may be set off by commas, and a fraction counts as one number.

    None where there is no number, or the last one divides by 0 or is too long to be meant.
    """
    found = [each.group() for each in _NUMBER.finditer(text)]
    numbers = [each for each in found if any(c.isdigit() for c in each)]
    return _value(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} holds, braces in it matched; None without one, or if it never ends."""
    begin = text.rfind("\\boxed{")
    if begin < 0:
        return None
    begin += len("\\boxed{")
    depth = 1
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[begin:place]
    return None


def _value(text: str) -> Fraction | None:
    if len(text) > _LONGEST:
        return None
    plain = re.sub(r"[,\s]", "", text).replace("\u2212", "-")
    try:
        parts = [Decimal(part.rstrip(".")) for part in plain.split("/")]
    except InvalidOperation:  # its power is beyond that of every decimal
        return None
    if any(abs(part.adjusted()) > _LONGEST for part in parts) or (len(parts) > 1 and not parts[1]):
        return None
    return Fraction(parts[0]) / (Fraction(parts[1]) if len(parts) > 1 else 1)


def _whole_number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else."""
    plain = _plain(text)
    match = _NUMBER.fullmatch(plain)
    return _value(plain) if match and any(c.isdigit() for c in plain) else None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().strip("$")).strip()
