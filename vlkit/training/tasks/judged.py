"""What the tasks that learn from their own answers share: prompts, answers, rewards of all ranks, mini-batches.

Items of prompts --sample_answers, verifier--> rewards of this rank --one exchange--> Judged: those of all ranks, in order
advantages --divided--> updates: this rank's answers as Items
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlkit.config import Config, Positive, Size
from vlkit.errors import ConfigError, SequenceTooLongError
from vlkit.objectives.policy import informative
from vlkit.optim.agree import gather_json
from vlkit.processing.labels import LabelRule
from vlkit.training.prompts import SuccessRates
from vlkit.training.rollouts import Answer, answer_batch, answer_seeds, sample_answers
from vlkit.training.tasks.answers import num_learnt, refuse_dropout
from vlkit.training.tasks.task import Draw, Item, Setup
from vlkit.training.update import autocast
from vlkit.training.verify import VERIFIERS, find_verifier, judged
from vlkit.training.writing import Writer


class RolloutOptions(Config):
    """How answers are drawn and judged.

    Attributes:
        verifier: Its name: "exact", "number", "boxed", or one given to the run. See `vlkit.training.verify`.
        group: Answers to each prompt, 2 or more: each is compared with the others.
        updates: Mini-batches that a step's prompts are divided into; each changes the weights.
        max_new_tokens: Of an answer.
        temperature: That answers are drawn at, and that their log-probs are of.
        truncated: What becomes of an answer that had no end: "judge" as any other, "fail" with reward 0, or "mask", which
            judges it for its group and learns nothing from it.
        prompts_at_once: Prompts of a rank that are answered together. More is faster and takes more memory; with more than 1
            the rounding of an answer may depend on its neighbours, and so on the number of ranks.
    """

    verifier: str
    group: Size = 8
    updates: Size = 1
    max_new_tokens: Size = 256
    temperature: Positive = 1.0
    truncated: Literal["judge", "fail", "mask"] = "judge"
    prompts_at_once: Size = 1

    def check(self) -> None:
        if self.group < 2:
            raise ConfigError(
                f"{type(self).__name__}.group: {self.group} answer has none to be compared with and teaches nothing; take 2"
            )


LACK = "no prompt whose answers got different rewards"
REMEDY = (
    "look at reward and length in the metrics: prompts are too hard or too easy, or objective.verifier sees no difference; "
    "max_skipped_steps says how long to wait"
)

Pull = Literal["none", "reference", "old"]
"""What a loss holds an answer near, beside its advantage."""


class Judged(NamedTuple):
    """All answers of a step, of all ranks, by prompts in the order of the ranks; [answers] each.

    Attributes:
        rewards: Of the verifier.
        lengths: In tokens.
        groups: Number of the prompt in the step.
        masked: Not learnt from.
        progress: Of the stage, when the prompt was drawn.
        own: This rank's, as items with their number among all.
        figures: Of all ranks.
    """

    rewards: Float[Tensor, " answers"]
    lengths: Int[Tensor, " answers"]
    groups: Int[Tensor, " answers"]
    masked: Bool[Tensor, " answers"]
    progress: Float[Tensor, " answers"]
    own: list[tuple[int, Item]]
    figures: dict[str, float]

    @property
    def correct(self) -> Bool[Tensor, " answers"]:
        """Answers with a reward of at least a half."""
        return self.rewards >= 0.5


class Rollouts:
    """Draws and judges the answers of a step.

    Attributes:
        rates: How often each sample was answered rightly, for draws by success.

    Raises:
        ConfigError: An unknown verifier, options of the data that do not reach prompts, adapters that drop inputs, answers that
            leave no room for prompts, or a model whose weights are divided over ranks: it cannot generate.
    """

    def __init__(self, options: RolloutOptions, setup: Setup) -> None:
        self.options, self.setup, self.writer = options, setup, Writer.of(setup)
        self.verifier = find_verifier(options.verifier, setup.verifiers)
        self.rates = SuccessRates()
        refuse_dropout(setup)
        config, positions = setup.config, setup.model.llm.config.max_positions
        if config.ranks.sharding == "fsdp":
            raise ConfigError(
                "objectives that draw answers need whole weights on every rank: set ranks.sharding = 'zero1'"
            )
        if config.data.labels != LabelRule() or config.data.too_long == "cut":
            raise ConfigError(
                "objectives that draw answers learn all of them and cut no prompt: leave out data.labels, and set "
                "data.too_long to 'refuse' or 'skip'"
            )
        self.limits = [(config.data.max_tokens, "data.max_tokens allows")] if config.data.max_tokens else []
        if positions and options.max_new_tokens >= positions:
            raise ConfigError(
                f"{type(options).__name__}.max_new_tokens: {options.max_new_tokens} leaves no room for a prompt in the "
                f"{positions} positions of the decoder; make it smaller"
            )
        if positions:
            name = f"the {positions} positions of the decoder leave with max_new_tokens = {options.max_new_tokens}"
            self.limits.append((positions - options.max_new_tokens, name))

    def prepare(self, sample: dict[str, Any], draw: Draw) -> Item:
        """The prompt, ending where the answer begins.

        Raises:
            SequenceTooLongError: It leaves no room for an answer.
            SampleError: The verifier needs an answer that the sample does not have.
        """
        shown, pixels = self._drawn(sample, draw)
        batch = self.setup.processor(*_prompt(shown), tools=shown.get("tools"), max_pixels=pixels)
        self._check_length(batch.ids.layout.num_tokens)
        key = f"{getattr(draw, 'stream', 0)}/{getattr(draw, 'index', 0)}"
        return Item(batch, {"sample": sample, "key": key, "progress": draw.progress})

    def measure(self, sample: dict[str, Any], draw: Draw) -> tuple[int, int]:
        """Tokens and patches of the prompt."""
        shown, pixels = self._drawn(sample, draw)
        tokens, patches = self.setup.processor.measure(*_prompt(shown), tools=shown.get("tools"), max_pixels=pixels)
        self._check_length(tokens)
        return tokens, patches

    def _drawn(self, sample: dict[str, Any], draw: Draw) -> tuple[dict[str, Any], int | None]:
        if self.verifier in VERIFIERS.values():
            self.verifier(
                "", sample
            )  # sees whether it can judge answers to this sample, as long as its file and line are known
        return self.writer.drawn(sample, draw)

    def _check_length(self, tokens: int) -> None:
        for limit, name in self.limits:
            if tokens > limit:
                raise SequenceTooLongError(
                    f"a prompt of {tokens} tokens is longer than the {limit} that {name}; shorten one of them, or leave such "
                    "prompts out with data.too_long = 'skip'"
                )

    def judge(self, prompts: list[Item], seed: int) -> Judged:
        """Collective. Answers to this rank's prompts, and the rewards of all."""
        ranks, options = self.setup.ranks, self.options
        counts = [count for (count,) in ranks.gather(len(prompts))]
        first = sum(counts[: ranks.rank])
        rows: list[list[Any]] = []
        items: list[Item] = []
        with ranks.together():
            answers = self._answers(prompts, first, seed)
            for place, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
                for answer in group:
                    rows.append(
                        [self._reward(answer, prompt), len(answer.ids), first + place, *answer[2:], answer.empty]
                    )
                    rows[-1] += [prompt.extra["progress"], prompt.extra["key"]]
                    items.append(Item(answer_batch(prompt.batch, answer.ids), {"text": answer.text}))
        everything = [row for part in gather_json(rows, ranks.group) for row in part]
        begin = sum(counts[: ranks.rank]) * options.group
        return self._judged(everything, list(enumerate(items, begin)))

    def _judged(self, rows: list[list[Any]], own: list[tuple[int, Item]]) -> Judged:
        rewards = torch.tensor([row[0] for row in rows], dtype=torch.float64)
        lengths, groups = (torch.tensor([row[column] for row in rows], dtype=torch.int64) for column in (1, 2))
        truncated, broken, empty = (torch.tensor([row[column] for row in rows]).bool() for column in (3, 4, 5))
        masked = truncated if self.options.truncated == "mask" else torch.zeros_like(truncated)
        for row in rows:
            self.rates.count(row[7], row[0] >= 0.5)

        def mean(values: Tensor) -> float:
            return float(values.double().mean()) if len(values) else 0.0

        figures = {
            "reward": mean(rewards),
            "equal_groups": mean(~informative(rewards, groups)),
            "length": mean(lengths),
            "truncated": mean(truncated),
            "broken": mean(broken),
            "empty": mean(empty),
        }
        progress = torch.tensor([row[6] for row in rows], dtype=torch.float64)
        return Judged(rewards, lengths, groups, masked, progress, own, figures)

    def _answers(self, prompts: list[Item], first: int, seed: int) -> list[list[Answer]]:
        options, setup = self.options, self.setup
        found: list[list[Answer]] = []
        for begin in range(0, len(prompts), options.prompts_at_once):
            some = prompts[begin : begin + options.prompts_at_once]
            seeds = [answer_seeds(seed, first + begin + place, options.group) for place in range(len(some))]
            with autocast(setup.config, setup.ranks.device, setup.model.parts_are_sharded):
                found += sample_answers(
                    setup.model,
                    setup.processor,
                    [item.batch for item in some],
                    seeds,
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                )
        return found

    def _reward(self, answer: Answer, prompt: Item) -> float:
        """What the verifier says; 0 for an answer that is broken, or had no end where that fails."""
        if answer.broken or (answer.truncated and self.options.truncated == "fail"):
            return 0.0
        try:
            return judged(self.verifier, answer.text, prompt.extra["sample"])
        except Exception as error:
            stream, index = prompt.extra["key"].split("/")
            error.add_note(
                f"the verifier {self.options.verifier!r} judged {answer.text[:80]!r}, an answer to sample {index} of stream "
                f"{stream}, both counted from 0: {prompt.extra['sample']['messages'][-1].get('content')!r:.200}"
            )
            raise

    def divided(
        self, found: Judged, advantages: Tensor, kept: Bool[Tensor, " answers"], *, pull: Pull
    ) -> list[list[Item]]:
        """This rank's answers in the step's mini-batches, prompt by prompt in turn: the same for any number of ranks.

        A mini-batch without a gradient, of all ranks, is left out: decay and momentum would move the weights all the same.

        Args:
            advantages: Of all answers.
            kept: Answers that are learnt from; all of a prompt's or none.
            pull: What has a gradient where all advantages are 0: the distance from the "reference"; that from the "old" policy,
                which a step has left after its first update; or "none".

        Returns:
            One mini-batch without an item where none teaches.
        """
        prompts = found.groups[kept].unique().tolist()
        turn = {prompt: place % self.options.updates for place, prompt in enumerate(prompts)}
        updates: list[list[Item]] = [[] for _ in range(min(self.options.updates, max(len(prompts), 1)))]
        learnt = kept & ~found.masked & (found.lengths > 0)
        moving = learnt if pull == "reference" else learnt & (advantages != 0)
        teaching = {turn[prompt] for prompt in found.groups[moving].tolist()}
        if pull == "old" and teaching:
            teaching |= {turn[prompt] for prompt in found.groups[learnt].tolist() if turn[prompt] > min(teaching)}
        for number, item in found.own:
            if kept[number] and not found.masked[number]:
                extra = {**item.extra, "advantage": float(advantages[number])}
                updates[turn[int(found.groups[number])]].append(Item(item.batch, extra))
        return [_with_tokens(updates[place]) for place in sorted(teaching)] or [[]]

    def state_dict(self) -> dict[str, Any]:
        return {"success": self.rates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rates.load_state_dict(state["success"])


def _with_tokens(items: list[Item]) -> list[Item]:
    """The items with the number of tokens that this rank learns in their mini-batch."""
    tokens = sum(num_learnt(item.batch) for item in items)
    return [Item(item.batch, {**item.extra, "local_tokens": tokens}) for item in items]


def _prompt(sample: dict[str, Any]) -> tuple[Any, Any, Any]:
    return sample["messages"], sample.get("images"), sample.get("videos")
