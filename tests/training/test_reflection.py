"""Pairs from a trace with a wrong step."""

from __future__ import annotations

import pytest

from vlkit.errors import SampleError
from vlkit.training.reflection import Step, correction_pair, positive, reflection_pair
from vlkit.training.samples import check_sample

TASK = [{"role": "system", "content": "You see a screen."}, {"role": "user", "content": "Open the settings."}]
STEPS = [
    Step("home", "click menu"),
    Step([{"type": "image", "image": "menu.png"}], "click games"),
    Step("games", "scroll down"),
    Step("more games", "give up"),
]


def said(messages: list[dict[str, object]]) -> list[object]:
    return [message["content"] for message in messages]


def test_a_correction_ends_before_the_wrong_step() -> None:
    pair = correction_pair(TASK, STEPS, 1, "click settings")
    assert check_sample(pair, "here") == "pair"
    assert said(pair["messages"]) == [
        "You see a screen.",
        "Open the settings.",
        "home",
        "click menu",
        [{"type": "image", "image": "menu.png"}],
    ]
    assert (said(pair["chosen"]), said(pair["rejected"])) == (["click settings"], ["click games"])


def test_a_reflection_keeps_the_wrong_step_and_differs_behind_it() -> None:
    pair = reflection_pair(TASK, STEPS, 1, "wrong menu: go back")
    assert said(pair["messages"])[-2:] == ["click games", "games"]
    assert (said(pair["chosen"]), said(pair["rejected"])) == (["wrong menu: go back"], ["scroll down"])


def test_of_the_better_side_only_the_answer_is_learnt() -> None:
    sample = positive({**reflection_pair(TASK, STEPS, 1, "go back"), "id": 7})
    assert check_sample(sample, "here") == "conversation"
    assert sample["id"] == 7
    assert [message.get("loss") for message in sample["messages"]] == [False] * (len(sample["messages"]) - 1) + [None]
    assert sample["messages"][-1] == {"role": "assistant", "content": "go back"}


def test_steps_that_are_not_there_and_answers_that_are_equal_are_refused() -> None:
    with pytest.raises(SampleError, match="has 4 steps, and a pair needs step 4"):
        reflection_pair(TASK, STEPS, 3, "go back")
    with pytest.raises(SampleError, match="needs step -1"):
        correction_pair(TASK, STEPS, -1, "go back")
    with pytest.raises(SampleError, match="step 1: the better answer is the one that was given, 'click games'"):
        correction_pair(TASK, STEPS, 1, "click games")
