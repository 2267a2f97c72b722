"""Any tower with any projector and any decoder: it builds, or says why not; it learns, is saved, comes back, and answers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlkit
from vlkit.errors import ConfigError
from vlkit.models import VisionLanguageModel
from vlkit.registry import KINDS, component
from vlkit.testing import random_batch

COMPOSITIONS = list(itertools.product(*(vlkit.list_components(kind, "*-tiny") for kind in KINDS)))
SEQUENCES = [(5, [(1, 2), (3, 1)]), (4, [])]


def composed(vision: str, projector: str, llm: str) -> VisionLanguageModel:
    if vision.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return vlkit.compose(vision=vision, projector=projector, llm=llm)


@pytest.mark.parametrize(("vision", "projector", "llm"), COMPOSITIONS)
def test_every_composition_learns_is_saved_and_answers_the_same(
    vision: str, projector: str, llm: str, tmp_path: Path
) -> None:
    model = composed(vision, projector, llm)
    batch = random_batch(model, SEQUENCES)

    before = model(batch).loss
    before.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        after = model(batch).loss
    assert torch.isfinite(after)
    assert after < before

    model.eval().save_pretrained(tmp_path / "model")
    loaded = vlkit.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    prompt = random_batch(model, SEQUENCES, labels=False)
    answers = model.generate(prompt, max_new_tokens=3, stop=())
    assert [len(answer) for answer in answers] == [3, 3]
    assert loaded.generate(prompt, max_new_tokens=3, stop=()) == answers


VISUAL = list(itertools.product(*(vlkit.list_components(kind, "*-tiny") for kind in ("vision", "projector"))))


@pytest.mark.parametrize(("vision", "projector"), VISUAL)
def test_every_composition_has_a_processor_whose_placeholders_it_fills(vision: str, projector: str) -> None:
    model = composed(vision, projector, "qwen3-tiny").eval()
    processor = vlkit.create_processor(model)
    image = Image.fromarray(torch.randint(256, (37, 61, 3), dtype=torch.uint8).numpy())
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]

    answers = model.generate(processor([chat, chat[:1]]), max_new_tokens=2, stop=())

    assert answers[0] == answers[1]


@pytest.mark.parametrize(("vision", "projector"), VISUAL)
def test_parts_that_do_not_fit_are_refused_when_they_are_joined(vision: str, projector: str) -> None:
    """A config of the projector is taken as it is, so its widths are compared; both numbers are in the message."""
    tower, made, decoder = (
        component(kind, name).configs[name]
        for kind, name in (("vision", vision), ("projector", projector), ("llm", "qwen3-tiny"))
    )
    widths = {"in_dim": tower.out_dim, "out_dim": decoder.dim}  # type: ignore[attr-defined]
    for field, right in widths.items():
        wrong = made.replace(**{**widths, field: 2 * right})
        with pytest.raises(ConfigError, match=rf"{2 * right}.* {right}"):
            vlkit.compose(vision=tower, projector=wrong, llm=decoder, device="meta")
