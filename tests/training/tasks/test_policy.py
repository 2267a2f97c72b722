"""Policies that learn from their own answers: formulas on separate forwards, and answers of every unhappy kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.ranks import run_ranks
from tests.training.tasks.setups import gradients, joined, make_task, model_of, prepared, token_log_probs
from vlkit.errors import ConfigError, SampleError, SequenceTooLongError
from vlkit.models import VisionLanguageModel
from vlkit.training.order import Draw
from vlkit.training.ranks import Ranks
from vlkit.training.tasks.task import Item
from vlkit.training.update import blank_batch


def questions(count: int = 3) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": "q" * (i + 1)}], "answer": str(i)} for i in range(count)]


def letters(text: str, sample: Mapping[str, Any]) -> float:
    """A reward that differs between the answers of untrained weights: bytes that are odd."""
    return sum(ord(each) % 2 for each in text) / 4


GRPO = {"kind": "grpo", "verifier": "letters", "group": 3, "max_new_tokens": 4}
MIRROR = {"kind": "mirror-descent", "verifier": "letters", "group": 3, "max_new_tokens": 4, "tau": 0.7}


def make(objective: dict[str, Any], verifiers: Mapping[str, Any] | None = None, **options: Any) -> Any:
    return make_task(objective, verifiers={"letters": letters, **(verifiers or {})}, **options)


def moved(model: VisionLanguageModel, by: float) -> None:
    """The weights of another policy, near by."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def total(task: Any, updates: list[list[Item]], place: int = 0) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures of an update in two packs."""
    items = updates[place]
    totals = task.totals(items)
    packs = [pack for pack in (items[:2], items[2:]) if pack]
    found = [task.loss(task.setup.model, pack, joined(pack), totals) for pack in packs]
    figures = {name: float(sum(each[name] for _, each in found)) / totals[name] for name in found[0][1]}
    return sum(loss for loss, _ in found), figures  # type: ignore[return-value]


def advantages_of(task: Any, items: list[Item], deviation: bool = True) -> list[float]:
    rewards = torch.tensor([letters(item.extra["text"], {}) for item in items], dtype=torch.float64).view(-1, 3)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4) if deviation else centred).flatten().tolist()


@pytest.mark.parametrize("variant", ["grpo", "dr-grpo", "dapo", "bnpo"])
def test_grpo_equals_its_formula_after_the_policy_has_moved(variant: str) -> None:
    """fp64, temperature 0.8, distance from a reference. Advantages and weights are fp32."""
    task = make({**GRPO, "variant": variant, "updates": 1, "kl_weight": 0.05, "temperature": 0.8, "clip": [0.1, 0.2]})
    model, frozen = task.setup.model, task.setup.reference()
    updates, _ = task.begin(prepared(task, questions()), 5)
    [items] = updates
    assert "old" not in items[0].extra
    old = [token_log_probs(model, item.batch, 0.8)[0].detach() for item in items]
    items = [Item(item.batch, {**item.extra, "old": _aligned(item, own)}) for item, own in zip(items, old, strict=True)]
    moved(model, 0.03)
    loss, figures = total(task, [items])
    found = gradients(model, loss)

    advantages = advantages_of(task, items, deviation=variant != "dr-grpo")
    per_answer, clipped, distance = [], [], []
    for item, a, before in zip(items, advantages, old, strict=True):
        ours = token_log_probs(model, item.batch, 0.8)[0]
        d = token_log_probs(frozen, item.batch, 0.8)[0].detach() - ours
        q = (ours - before).exp()
        free, held = q * a, q.clamp(0.9, 1.2) * a
        clipped.append((held < free).double())
        distance.append(d.exp() - d - 1)
        per_answer.append(-torch.minimum(free, held) + 0.05 * distance[-1])
    tokens = sum(len(each) for each in per_answer)
    expected = {
        "grpo": sum(each.mean() for each in per_answer) / len(items),
        "dr-grpo": sum(each.sum() for each in per_answer) / (len(items) * 4),
        "dapo": sum(each.sum() for each in per_answer) / tokens,
        "bnpo": sum(each.sum() for each in per_answer) / tokens,
    }[variant]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(found, gradients(model, expected), rtol=1e-5, atol=1e-8)  # type: ignore[arg-type]
    assert figures["clip_fraction"] == pytest.approx(torch.cat(clipped).mean().item())
    assert 0 < figures["clip_fraction"] < 1
    assert figures["kl"] == pytest.approx(torch.cat(distance).mean().item(), rel=1e-6)


def _aligned(item: Item, own: Tensor) -> Tensor:
    """Log-probs of the answer where the targets of a batch have them."""
    found = own.new_zeros(item.num_tokens)
    found[item.num_tokens - 1 - len(own) : -1] = own
    return found


def test_mini_batches_bring_the_log_probs_of_the_training_forward_before_the_step() -> None:
    task = make({**GRPO, "updates": 2}, micro_batch=2)
    updates, told = task.begin(prepared(task, questions()), 5)
    assert [len(items) for items in updates] == [6, 3]
    assert not any("old" in item.extra for item in updates[0])
    for item in updates[1]:
        want = _aligned(item, token_log_probs(task.setup.model, item.batch)[0].detach())
        torch.testing.assert_close(item.extra["old"], want, rtol=0, atol=1e-12)
    items = updates[0]
    loss, figures = total(task, updates)
    assert figures["clip_fraction"] == 0
    assert loss.item() == pytest.approx(-sum(item.extra["advantage"] for item in items) / len(items), abs=1e-9)
    found = gradients(task.setup.model, loss)
    surrogate = -sum(
        item.extra["advantage"] * token_log_probs(task.setup.model, item.batch)[0].mean() for item in items
    ) / len(items)
    # What a token weighs is fp32.
    torch.testing.assert_close(found, gradients(task.setup.model, surrogate), rtol=1e-6, atol=1e-9)
    assert told["length"] > 1


def test_mirror_descent_equals_its_formula_on_whole_answers() -> None:
    task = make({**MIRROR, "updates": 2})
    assert task.resets_optimizer
    updates, _ = task.begin(prepared(task, questions()), 5)
    model = task.setup.model
    old = [token_log_probs(model, item.batch)[0].sum().detach() for item in updates[1]]
    first = gradients(model, total(task, updates)[0])
    surrogate = -sum(
        a * token_log_probs(model, item.batch)[0].sum()
        for a, item in zip(_of_updates(task, updates, 0), updates[0], strict=True)
    )
    torch.testing.assert_close(first, gradients(model, surrogate / 6), rtol=1e-5, atol=1e-9)  # type: ignore[arg-type,operator]
    moved(model, 0.02)
    loss, figures = total(task, updates, 1)
    expected, ratios = torch.zeros((), dtype=torch.float64), []
    for item, a, before in zip(updates[1], _of_updates(task, updates, 1), old, strict=True):
        ours = token_log_probs(model, item.batch)[0].sum()
        expected = expected - a * ours + 0.35 * (ours - before) ** 2
        ratios.append(float(ours.detach() - before))
    assert loss.item() == pytest.approx(float(expected.detach()) / 3, rel=1e-5)
    assert figures["log_ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-6)


def _of_updates(task: Any, updates: list[list[Item]], place: int) -> list[float]:
    """Prompts 0 and 2 are in the first mini-batch, prompt 1 in the second; every group is a neighbourhood of three."""
    return advantages_of(task, updates[place], deviation=False)


def planted(monkeypatch: pytest.MonkeyPatch, *answers: list[str | list[int]]) -> None:
    """Make the policy say these: texts that end, or ids as they are."""

    def generate(model: VisionLanguageModel, batch: Any, *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        stop = options["stop"][0]
        texts = [[ord(c) for c in a] + [stop] if isinstance(a, str) else a for a in said.pop(0)]
        assert len(texts) == batch.ids.layout.num_items
        return texts

    said = list(answers)
    monkeypatch.setattr(VisionLanguageModel, "generate", generate)


def test_unhappy_answers_are_defined_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    image = model_of(0).config.image_token_id
    rewards = {"judge": [0, 1, 1, 0, 0, 0], "fail": [0, 1, 0, 0, 0, 0], "mask": [0, 1, 1, 0, 0, 0]}
    for truncated, expected in rewards.items():
        planted(monkeypatch, ["no", "0", [ord("0")] * 4], ["", [ord("1"), image, 1], "10"])
        task = make_task({**GRPO, "verifier": "number", "truncated": truncated}, verifiers={})
        [items], told = task.begin(prepared(task, questions(2)), 0)
        assert told == pytest.approx(
            {
                "reward": sum(expected) / 6,
                "equal_groups": 0.5,
                "length": (3 + 2 + 4 + 1 + 1 + 3) / 6,
                "truncated": 1 / 6,
                "broken": 1 / 6,
                "empty": 1 / 6,
            }
        )
        assert len(items) == (5 if truncated == "mask" else 6)
        assert task.totals(items)["tokens"] == (10 if truncated == "mask" else 14)
        loss, _ = total(task, [items])
        assert all(bool(grad.isfinite().all()) for grad in gradients(task.setup.model, loss).values())
        rates = task.state_dict()["success"]["counts"]
        assert rates == {"0/0": [3, sum(expected)], "0/1": [3, 0]}


def test_half_a_reward_is_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, ["5", "4", "6"])
    task = make_task({**GRPO, "verifier": "tenths"}, verifiers={"tenths": lambda text, sample: int(text) / 10})
    task.begin(prepared(task, questions(1)), 0)
    assert task.rates.rate("0/0") == pytest.approx(2 / 3)


def test_dapo_leaves_out_groups_of_equal_rewards_and_punishes_length(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, ["no", "0", "x"], ["1", "1", "1"])
    task = make({**GRPO, "verifier": "number", "variant": "dapo", "updates": 4})
    updates, _ = task.begin(prepared(task, questions(2)), 0)
    assert [len(items) for items in updates] == [3]
    planted(monkeypatch, ["1", "1", "1"], ["1", "1", "1"])
    updates, told = task.begin(prepared(task, questions(2)[1:] * 2), 0)
    assert (updates, told["equal_groups"]) == ([[]], 1.0)
    assert not any(task.totals([]).values())
    planted(monkeypatch, ["1", "1 ", "1  "])
    task = make({**GRPO, "verifier": "number", "variant": "dapo", "overlong_margin": 2})
    [items], _ = task.begin(prepared(task, questions(2)[1:]), 0)
    rewards = torch.tensor([1.0, 0.5, 0.0])
    want = (rewards - 0.5) / (rewards.std() + 1e-4)
    assert [item.extra["advantage"] for item in items] == pytest.approx(want.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "alone", "between"),
    [
        (GRPO, [0], [1]),
        ({**GRPO, "variant": "bnpo"}, [0], [1]),
        ({**GRPO, "kl_weight": 0.1}, [0], [1, 1]),
        (MIRROR, [0], [1, 1]),
        ({**MIRROR, "baseline": "log-mean-exp"}, [0], [1, 1]),
    ],
)
def test_mini_batches_of_equal_rewards_are_left_out_where_nothing_else_pulls(
    monkeypatch: pytest.MonkeyPatch, objective: dict[str, Any], alone: list[int], between: list[int]
) -> None:
    """Of one mini-batch with three prompts; and of three, where only the answers to the second prompt differ."""
    task = make({**objective, "verifier": "tenths"}, {"tenths": lambda text, sample: int(text) / 10})
    planted(monkeypatch, *[["3", "3", "3"]] * 3)
    updates, told = task.begin(prepared(task, questions(3)), 0)
    assert ([len(items) // 3 for items in updates], told["equal_groups"]) == (alone, 1.0)
    assert any(task.totals(updates[0]).values()) == bool(alone[0])
    planted(monkeypatch, ["3", "3", "3"], ["3", "4", "3"], ["7", "7", "7"])
    task.rollouts.options = task.rollouts.options.replace(updates=3)
    updates, _ = task.begin(prepared(task, questions(3)), 0)
    assert [len(items) // 3 for items in updates] == between
    assert not any("old" in item.extra for item in updates[0])


def test_a_reference_pulls_as_soon_as_something_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that, the distance from it is a rounding, which an optimizer may scale up to a full step."""
    task = make({**GRPO, "verifier": "tenths", "kl_weight": 0.1}, {"tenths": lambda text, sample: int(text) / 10})
    equal, found = ["3", "3", "3"], []
    for texts in (equal, ["3", "4", "3"], equal):
        planted(monkeypatch, texts)
        updates, _ = task.begin(prepared(task, questions(1)), 0)
        found.append([len(items) for items in updates])
        state = json.loads(json.dumps(task.state_dict()))
        task = make({**GRPO, "verifier": "tenths", "kl_weight": 0.1}, {"tenths": lambda text, sample: int(text) / 10})
        task.load_state_dict(state)
    assert found == [[0], [3], [3]]


def test_a_mini_batch_without_a_token_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of an image's placeholder are cut before it; the only other one had no end, and is masked."""
    image = model_of(0).config.image_token_id
    for objective in (GRPO, {**GRPO, "kl_weight": 0.1}, MIRROR):
        planted(monkeypatch, [[image, 1], [image, 2], [ord("0")] * 4])
        task = make(
            {**objective, "truncated": "mask", "verifier": "length"}, {"length": lambda text, sample: len(text)}
        )
        assert task.begin(prepared(task, questions(1)), 0)[0] == [[]]


def test_what_a_verifier_cannot_judge_is_found_where_file_and_line_are_known() -> None:
    task = make({**GRPO, "verifier": "number"})
    for answer in ({}, {"answer": "blue"}):
        sample = {"messages": [{"role": "user", "content": "?"}], **answer}
        for look in (task.prepare, task.measure):
            with pytest.raises(SampleError, match=r"a question with an 'answer' is expected|an answer with a number"):
                look(sample, Draw(0, 0))


def test_a_verifier_that_fails_is_told_at_which_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make({**GRPO, "verifier": "broken"}, {"broken": lambda text, sample: 1 / 0})
    planted(monkeypatch, ["no", "0", "x"])
    with pytest.raises(ZeroDivisionError) as failure:
        task.begin([task.prepare(questions(1)[0], Draw(1, 7))], 0)
    assert failure.value.__notes__ == [
        "the verifier 'broken' judged 'no', an answer to sample 7 of stream 1, both counted from 0: 'q'"
    ]


def test_short_answers_are_rewarded_from_a_progress_on(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make({**MIRROR, "verifier": "number", "length_weight": 2.0, "length_from": 0.5})
    found = []
    for progress in (0.4, 0.5):
        planted(monkeypatch, ["1", "x", "1 1"])
        [items], _ = task.begin(prepared(task, questions(2)[1:], progress), 0)
        found.append([item.extra["advantage"] for item in items])
    assert found[0] == pytest.approx([1 / 3, -2 / 3, 1 / 3], abs=1e-6)
    mean = ((1 + 1) + 0 + (1 - 1)) / 3
    assert found[1] == pytest.approx([2 - mean, 0 - mean, 0 - mean], abs=1e-6)


def test_the_exact_baseline_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, ["1", "x", "1"])
    task = make({**MIRROR, "verifier": "number", "baseline": "log-mean-exp"})
    [items], _ = task.begin(prepared(task, questions(2)[1:]), 0)
    level = 0.7 * math.log((2 * math.exp(1 / 0.7) + 1) / 3)
    assert [item.extra["advantage"] for item in items] == pytest.approx([1 - level, -level, 1 - level], abs=1e-6)


def _begun(rank: int, objective: dict[str, Any], counts: list[int]) -> list[Any]:
    import torch.distributed as dist

    ranks = Ranks(rank, len(counts), torch.device("cpu"), dist.group.WORLD)
    task = make(objective, among=ranks)
    mine = range(sum(counts[:rank]), sum(counts[: rank + 1]))
    items = [task.prepare(questions(4)[i], Draw(0, i)) for i in mine]
    updates, told = task.begin(items, 100)
    plain = [[(item.batch.ids.tokens.tolist(), item.extra["advantage"]) for item in update] for update in updates]
    return [plain, told, json.dumps(task.state_dict())]


def test_ranks_divide_the_answers_and_change_none() -> None:
    """Four prompts on one rank; then 3, 0 and 1 of them on three."""
    objective = {**GRPO, "updates": 2}
    alone = make(objective)
    updates, told = alone.begin(prepared(alone, questions(4)), 100)
    whole = [[(item.batch.ids.tokens.tolist(), item.extra["advantage"]) for item in update] for update in updates]
    parts = run_ranks(_begun, 3, objective, [3, 0, 1])
    assert [[row for part, _, _ in parts for row in part[place]] for place in range(2)] == whole
    assert all(figures == told for _, figures, _ in parts)
    assert {state for _, _, state in parts} == {json.dumps(alone.state_dict())}


@pytest.mark.parametrize("objective", [{**GRPO, "kl_weight": 0.1}, MIRROR])
def test_a_rank_without_prompts_gives_every_parameter_a_gradient_of_zero(objective: dict[str, Any]) -> None:
    task = make(objective)
    updates, told = task.begin([], 0)
    assert updates == [[]]
    assert set(told.values()) == {0.0}
    model = task.setup.model
    loss, figures = task.loss(model, [], blank_batch(model), {"answers": 3.0, "tokens": 9.0, "parts": 1.0})
    found = gradients(model, loss)
    assert (loss.item(), figures) == (0.0, {})
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert not any(grad.any() for grad in found.values())


def test_prompts_are_measured_and_shown_as_the_run_says() -> None:
    """Images first, and no more pixels than the schedule of the resolution gives."""
    image = Image.new("RGB", (84, 56))
    content = [{"type": "text", "text": "what?"}, {"type": "image", "image": image}]
    sample = {"messages": [{"role": "user", "content": content}], "answer": "1"}
    plain = make(GRPO)
    small = make(GRPO, data={"files": ["unused"], "images_first": 1.0}, resolution={"points": [[0.0, 28 * 28]]})
    for task in (plain, small):
        item = task.prepare(sample, Draw(0, 0))
        assert task.measure(sample, Draw(0, 0)) == (item.num_tokens, item.num_patches)
        assert item.extra["sample"] is sample
    before, after = (task.prepare(sample, Draw(0, 0)) for task in (plain, small))
    assert after.num_patches < before.num_patches
    text = plain.setup.processor.decode(after.batch.ids.tokens.tolist())
    assert text != plain.setup.processor.decode(before.batch.ids.tokens.tolist())


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="no verifier 'lettrs'"):
        make({**GRPO, "verifier": "lettrs"})
    with pytest.raises(ConfigError, match="need whole weights on every rank"):
        make(GRPO, ranks={"sharding": "fsdp"})
    with pytest.raises(ConfigError, match="overlong_margin: 5 is more than max_new_tokens = 4"):
        make({**GRPO, "overlong_margin": 5})
    with pytest.raises(ConfigError, match="missing tau"):
        make({key: value for key, value in MIRROR.items() if key != "tau"})
    task = make({**GRPO, "max_new_tokens": 4090})
    with pytest.raises(SequenceTooLongError, match="positions of the decoder leave with max_new_tokens = 4090"):
        prepared(task, questions(1))
    with pytest.raises(ConfigError, match=r"max_new_tokens: 4096 leaves no room for a prompt in the 4096 positions"):
        make({**GRPO, "max_new_tokens": 4096})
    for objective in (GRPO, MIRROR):
        with pytest.raises(ConfigError, match=r"Options\.group: 1 answer has none to be compared with"):
            make({**objective, "group": 1})
    with pytest.raises(ConfigError, match=r"lora\.dropout = 0\.5: this objective compares log-probs"):
        make(GRPO, lora={"dropout": 0.5})
    data = {"files": ["unused"], "max_tokens": 3}
    with pytest.raises(SequenceTooLongError, match=r"longer than the 3 that data\.max_tokens allows"):
        make(GRPO, data=data).measure(questions(1)[0], Draw(0, 0))
    for given in ({"labels": {"turns": "last"}}, {"too_long": "cut"}):
        with pytest.raises(ConfigError, match="learn all of them and cut no prompt"):
            make(GRPO, data={"files": ["unused"], **given})
