"""Pairs from traces of an agent that went wrong: one corrects the wrong step, one recovers after it.

    episode: task, then (observation, answer) again and again; step `wrong` has the first wrong answer
    correction_pair: task, steps before, observation of `wrong`           -> corrected answer > wrong answer
    reflection_pair: the same with the wrong answer, the next observation  -> recovering answer > the answer given

The pairs are samples for the "dpo" and "mpo" objectives; `positive` makes one of them a sample to imitate.

Source: UI-TARS, arXiv:2501.12326, the parts on reflection tuning and on agent DPO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlkit.errors import SampleError

Content = str | Sequence[Mapping[str, Any]]
"""Of a message: a text, or parts such as {"type": "image", "image": path}."""


class Step(NamedTuple):
    """What an agent saw, and what it said: its thought and its action.

    Attributes:
        observation: Of the screen before the step; a user's message.
        answer: Thought and action, as the model wrote them.
    """

    observation: Content
    answer: str


def correction_pair(
    task: Sequence[Mapping[str, Any]], steps: Sequence[Step], wrong: int, corrected: str
) -> dict[str, Any]:
    """The corrected answer of a wrong step against the one given.

    Args:
        task: Messages before the first step; what is to be done.
        steps: Of the episode; those after `wrong` are left out.
        wrong: Number of the wrong step.
        corrected: Thought and action that would have been right there.

    Raises:
        SampleError: No such step, or nothing was corrected.
    """
    return _pair(task, steps, wrong, corrected)


def reflection_pair(
    task: Sequence[Mapping[str, Any]], steps: Sequence[Step], wrong: int, recovering: str
) -> dict[str, Any]:
    """After a wrong step that stays: the answer that notices and repairs it against the one that went on as if nothing was.

    Args:
        task: Messages before the first step; what is to be done.
        steps: Of the episode; the one after `wrong` is the last that is used.
        wrong: Number of the wrong step.
        recovering: Thought and action that were right after it.

    Raises:
        SampleError: No such step or none after it, or the answers are equal.
    """
    return _pair(task, steps, wrong + 1, recovering)


def positive(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The pair as a sample to imitate: its better answer is learnt, and nothing before it."""
    rest = {key: value for key, value in pair.items() if key not in ("messages", "chosen", "rejected")}
    return {**rest, "messages": [*as_prompt(pair["messages"]), *pair["chosen"]]}


def as_prompt(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of which nothing is learnt, whatever rule says what is."""
    return [{**message, "loss": False} for message in messages]


def _pair(task: Sequence[Mapping[str, Any]], steps: Sequence[Step], at: int, better: str) -> dict[str, Any]:
    if not 0 <= at < len(steps):
        raise SampleError(f"the episode has {len(steps)} steps, and a pair needs step {at}, counted from 0")
    if better == steps[at].answer:
        raise SampleError(f"step {at}: the better answer is the one that was given, {better[:80]!r}")
    messages: list[dict[str, Any]] = [dict(message) for message in task]
    for step in steps[:at]:
        messages += [_said("user", step.observation), _said("assistant", step.answer)]
    messages.append(_said("user", steps[at].observation))
    return {
        "messages": messages,
        "chosen": [_said("assistant", better)],
        "rejected": [_said("assistant", steps[at].answer)],
    }


def _said(role: str, content: Content) -> dict[str, Any]:
    return {"role": role, "content": content if isinstance(content, str) else [dict(part) for part in content]}
