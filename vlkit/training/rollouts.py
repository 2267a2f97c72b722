"""Answers of the policy to its prompts, drawn with vlkit's own generation and judged.

    prompt --group copies, a seed for each--> generate --> Answer: ids, text, how it ended
    prompt + ids --answer_batch--> Batch whose labels are the answer

What an answer is depends on the weights, the seed, and the number of the prompt in the step: not on ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from vlkit.models import VisionLanguageModel
from vlkit.objectives.cross_entropy import IGNORE
from vlkit.packing import Batch, Layout, Packed
from vlkit.processing import Processor
from vlkit.training.reflection import as_prompt


class Answer(NamedTuple):
    """One answer to a prompt.

    Attributes:
        ids: Without the prompt; the id that ended it is the last. There may be none.
        text: Without special tokens.
        truncated: It was not ended, but cut at the most tokens that it could have.
        broken: It held a placeholder of an image or a video, which stands for nothing: it was cut before that.
    """

    ids: tuple[int, ...]
    text: str
    truncated: bool
    broken: bool

    @property
    def empty(self) -> bool:
        """Whether it says nothing."""
        return not self.text.strip()


def sample_answers(
    model: VisionLanguageModel,
    processor: Processor,
    prompts: Sequence[Batch],
    seeds: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[list[Answer]]:
    """Several answers to each prompt, all of them at once.

    Args:
        prompts: Of one sequence each, ending where the answer begins.
        seeds: One for every answer, by prompts; as many answers are drawn.
        max_new_tokens: Of an answer.
        temperature: Divides the logits; 1 draws from the policy as it is.
    """
    config = model.config
    copies = [prompt for prompt, own in zip(prompts, seeds, strict=True) for _ in own]
    if not copies:
        return [[] for _ in prompts]
    stop = config.stop_ids or processor.stop_ids
    device = next(model.parameters()).device
    with _evaluated(model):
        drawn = model.generate(
            Batch.concat(copies).to(device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            seed=[seed for own in seeds for seed in own],
        )
    visual = {config.image_token_id, config.video_token_id}
    answers = iter([_answer(ids, processor, visual, stop, max_new_tokens) for ids in drawn])
    return [[next(answers) for _ in own] for own in seeds]


def answer_seeds(seed: int, prompt: int, group: int) -> list[int]:
    """A seed for every answer to a prompt, made of the step's seed and the prompt's number in the step."""
    words = np.random.SeedSequence(seed, spawn_key=(prompt,)).generate_state(group, np.uint64)
    return [int(word) >> 1 for word in words]


def answer_batch(prompt: Batch, ids: Sequence[int]) -> Batch:
    """The prompt with an answer behind it, whose tokens are the labels."""
    tokens = torch.cat([prompt.ids.tokens, torch.tensor(ids, dtype=prompt.ids.tokens.dtype)])
    labels = tokens.clone()
    labels[: prompt.ids.layout.num_tokens] = IGNORE
    return Batch(Packed(tokens, Layout((len(tokens),))), prompt.patches, labels=labels, seconds=prompt.seconds)


def rejection_sample(
    samples: Iterable[Mapping[str, Any]],
    generate: Callable[[Mapping[str, Any], int], str],
    verify: Callable[[str, Mapping[str, Any]], float | bool],
    n: int,
    *,
    keep: int = 1,
) -> Iterator[dict[str, Any]]:
    """Questions with answers that were found to be right, as conversations to imitate.

    Args:
        samples: With "messages", and whatever `verify` looks at.
        generate: The text of try number k at a sample.
        verify: Whether it is right: True, or a reward above 0.
        n: Most tries at a sample.
        keep: Most right answers of a sample that are kept; no two are equal.

    Yields:
        The sample with the answer as its last message, which alone is learnt, and without "answer" and "difficulty".
    """
    for sample in samples:
        found: list[str] = []
        for attempt in range(n):
            text = generate(sample, attempt)
            if text not in found and verify(text, sample) > 0:
                found.append(text)
            if len(found) == keep:
                break
        rest = {key: value for key, value in sample.items() if key not in ("answer", "difficulty")}
        for text in found:
            yield {**rest, "messages": [*as_prompt(sample["messages"]), {"role": "assistant", "content": text}]}


def _answer(
    ids: Sequence[int], processor: Processor, visual: set[int | None], stop: Sequence[int], max_new_tokens: int
) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in visual), None)
    kept = tuple(ids if end is None else ids[:end])
    truncated = end is None and len(kept) == max_new_tokens and kept[-1] not in stop
    return Answer(kept, processor.decode(kept), truncated, end is not None)


@contextmanager
def _evaluated(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back as it was: frozen parts of it are in that mode all the time."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
