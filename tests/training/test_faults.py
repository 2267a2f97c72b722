"""Ranks that die, hang, disagree or are asked to stop: the others end too, say why, and the run goes on from its checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from torch.testing import assert_close

from tests.ranks import run_ranks
from tests.training.processes import PATIENCE, Started
from tests.training.samples import small_config
from tests.training.test_loop import train_ranks, weights
from vlkit.training import EXIT_STOPPED, TrainConfig, train
from vlkit.training.faults import Heartbeat, stop_on_signals
from vlkit.training.run_checkpoint import complete_checkpoints


def long_config(folder: Path) -> TrainConfig:
    """Steps enough to be interrupted in, saved every second."""
    return small_config(folder, steps=400, checkpoints={"every": 2})


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_others_end_and_the_run_goes_on(tmp_path: Path, victim: int) -> None:
    config = long_config(tmp_path)
    started = Started(config, 2, tmp_path / "logs")
    started.wait_for(lambda: started.steps() >= 3)
    started.kill(victim, signal.SIGKILL)
    codes = started.end()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, started.said()
    said = started.said(1 - victim)
    assert f"vlkit: rank {1 - victim}: another rank died or does not answer, in step" in said
    newest = complete_checkpoints(Path(config.run) / "checkpoints")[0][0]
    step = int(newest.name.removeprefix("step-"))
    assert f"the newest checkpoint is {newest}" in said or victim == 0  # rank 0 may have saved a last one alone
    shorter = config.replace(steps=step + 2)
    lines: list[str] = []
    assert train(shorter, say=lines.append).steps == step + 2
    assert any(f"resumed from {newest}" in line for line in lines)
    assert not list((Path(config.run) / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_is_asked_to_stop_stops_all_after_the_same_step(tmp_path: Path, number: int) -> None:
    config = small_config(tmp_path, steps=400, checkpoints={"every": None})
    started = Started(config, 2, tmp_path / "logs")
    started.wait_for(lambda: started.steps() >= 3)
    started.kill(1, number)
    assert started.end() == [EXIT_STOPPED, EXIT_STOPPED], started.said()
    (saved,), skipped = complete_checkpoints(Path(config.run) / "checkpoints")
    assert not skipped
    assert int(saved.name.removeprefix("step-")) == started.steps() >= 3


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=400)
    started = Started(config, 1, tmp_path / "logs")
    started.wait_for(lambda: started.steps() >= 1)
    started.kill(0, signal.SIGSTOP)
    started.kill(0, signal.SIGINT)
    started.kill(0, signal.SIGCONT)
    started.kill(0, signal.SIGINT)
    (code,) = started.end()
    assert code in (1, 130, EXIT_STOPPED)


def test_a_rank_that_hangs_is_not_waited_for_longer_than_the_timeout(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=400, ranks={"timeout_minutes": 0.05, "heartbeat_seconds": 1.0})
    started = Started(config, 2, tmp_path / "logs")
    started.wait_for(lambda: started.steps() >= 2)
    started.kill(1, signal.SIGSTOP)
    started.ranks[0].join(PATIENCE)
    code = started.ranks[0].exitcode
    started.end(0)
    assert code == 1
    said = started.said(0)
    assert "another rank died or does not answer" in said
    assert "rank 0: " in said.split("vlkit:")[0]  # the heartbeat


def test_ranks_with_different_configs_do_not_begin(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    started = Started([config, config.replace(seed=1)], 2, tmp_path / "logs")
    assert started.end() == [1, 1]
    for rank in range(2):
        assert "rank 1 differs from rank 0 in config.seed: found 1, expected 0" in started.said(rank)
    assert not Path(config.run).exists()


def test_an_error_on_one_rank_is_told_by_all(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=400)
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("{}\n")
    started = Started(config, 2, tmp_path / "logs")
    assert started.end() == [1, 1]
    for rank in range(2):
        assert "train.jsonl, line 14" in started.said(rank)


def test_a_step_with_fewer_samples_than_ranks_is_legal(tmp_path: Path) -> None:
    whole = small_config(tmp_path, steps=3, batch=2, dtype="float64")
    spread = whole.replace(run=str(tmp_path / "spread"))
    train(whole)
    run_ranks(train_ranks, 3, spread, 0)
    assert_close(weights(spread), weights(whole), rtol=0, atol=1e-10)


def test_threads_end_with_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=1)
    train(config.replace(data=config.data.replace(workers=3)))
    assert threading.active_count() == 1 or not [
        each.name for each in threading.enumerate() if each.name.startswith(("samples", "heartbeat"))
    ]


def test_the_heartbeat_says_what_takes_long() -> None:
    now = [0.0]
    heartbeat = Heartbeat(print, 60.0, "rank 3", clock=lambda: now[0])
    heartbeat.now("in step 7")
    now[0] = 59.0
    assert heartbeat.look() is None
    now[0] = 61.0
    assert heartbeat.look() == "rank 3: in step 7 for 61 s"
    heartbeat.now("in step 8")
    assert heartbeat.look() is None


def test_a_heartbeat_may_be_longer_than_a_thread_can_wait() -> None:
    with Heartbeat(print, 1e300, "train") as heartbeat:
        heartbeat._thread.join(0.1)
        assert heartbeat._thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_noted_and_given_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.signal == signal.Signals(number).name
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert signal.getsignal(number) == before
