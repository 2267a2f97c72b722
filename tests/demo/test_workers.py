"""Workers: the same weights, other strips, and the mean of all gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vlkit.demo.options import Options
from vlkit.demo.run import build_model
from vlkit.demo.task import image_rule
from vlkit.demo.train import BatchMaker
from vlkit.demo.workers import Workers, learn, processes_for
from vlkit.errors import VlkitError
from vlkit.models import VisionLanguageModel
from vlkit.processing import Processor, ProcessorConfig

PROCESSOR = Processor(ProcessorConfig(image=image_rule(4, 2)))


@pytest.fixture(scope="module")
def team() -> Iterator[tuple[VisionLanguageModel, Workers]]:
    """A model and one worker beside this process."""
    torch.manual_seed(0)
    model = build_model(Options(vision="moonvit-tiny", llm="moonlight-tiny"))
    with Workers(model, PROCESSOR, 1, 3, seed=5) as workers:
        yield model, workers


def test_gradients_are_the_mean_over_all_processes_at_the_weights_of_now(
    team: tuple[VisionLanguageModel, Workers],
) -> None:
    model, workers = team
    mine = BatchMaker(PROCESSOR, 3, (5, 0))
    theirs = BatchMaker(PROCESSOR, 3, (5, 1))
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)  # in place: the worker sees it
        wanted, losses = [], []
        for maker in (mine, theirs):
            model.zero_grad()
            losses.append(learn(model, maker.make(step, 1)).loss)
            wanted.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()

        workers.begin(1)
        own = learn(model, mine.make(step, 1))
        (share,) = workers.collect()

        assert own.loss == pytest.approx(losses[0], abs=1e-6)
        assert share.loss == pytest.approx(losses[1], abs=1e-5)
        assert share.tokens == theirs.make(step, 1).ids.layout.num_tokens
        assert share.load[0].sum() == 2 * share.tokens  # top 2
        for parameter, first, second in zip(model.parameters(), *wanted, strict=True):
            torch.testing.assert_close(parameter.grad, (first + second) / 2, atol=1e-6, rtol=1e-4)


def test_a_worker_that_died_is_named_with_the_way_out(team: tuple[VisionLanguageModel, Workers]) -> None:
    _, workers = team
    workers._processes[0].kill()
    workers._processes[0].join()
    with pytest.raises(VlkitError, match="--workers 1"):
        workers.collect()


def test_without_workers_gradients_stay_as_they_are() -> None:
    model = build_model(Options(vision="moonvit-tiny", llm="moonlight-tiny"))
    with Workers(model, PROCESSOR, 0, 3, seed=0) as workers:
        workers.begin(1)
        learn(model, BatchMaker(PROCESSOR, 3, (0, 0)).make(0, 1))
        before = [p.grad.clone() for p in model.parameters()]
        assert workers.collect() == []
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True))


def test_as_many_processes_as_asked_or_as_can_run() -> None:
    assert processes_for(3) == 3
    assert processes_for(0) in (1, 2)
