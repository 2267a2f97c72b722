"""The contrast task: its loss is SigLIP plus weighted captions, over any packs and ranks, from one run of the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from tests.ranks import run_ranks
from vlkit.errors import CheckpointError, ConfigError, KeyMismatchError, PlaceholderMismatchError, SampleError
from vlkit.models.factory import create_model, create_processor
from vlkit.packing import Batch, Layout, Packed
from vlkit.training import TrainConfig
from vlkit.training.contrast_heads import ContrastHeads
from vlkit.training.ranks import Ranks
from vlkit.training.tasks.contrast import Contrast, ContrastOptions, text_key
from vlkit.training.tasks.task import Item, Setup

TEXTS = ("a cat", "two dogs", "a cat", "three", "the sea at night")
OPTIONS = ContrastOptions(dim=12, pool_heads=4, text_dim=16, text_layers=1, text_heads=2, text_mlp_dim=24)


class NoDraw:
    """The contrast task draws nothing unless a resolution is sampled."""

    rng = np.random.default_rng(0)
    progress = 0.0


def make(options: ContrastOptions = OPTIONS, ranks: Ranks | None = None, **config: Any) -> Contrast:
    torch.manual_seed(0)
    model = create_model("kimi-vl-tiny", dtype=torch.float64)
    whole = TrainConfig.from_dict(
        {"run": "run", "model": {"name": "kimi-vl-tiny"}, "data": {"files": ["-"]}, "steps": 1, "dtype": "float64"}
        | config
    )
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    return Contrast(options, Setup(model, create_processor("kimi-vl-tiny"), whole, ranks, lambda: model))


def samples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {"image": Image.fromarray(rng.integers(0, 255, (10 + 9 * i, 30, 3), dtype=np.uint8)), "text": text}
        for i, text in enumerate(TEXTS)
    ]


def items_of(task: Contrast) -> list[Item]:
    return [task.prepare(sample, NoDraw()) for sample in samples()]


def trained(task: Contrast) -> dict[str, Tensor]:
    whole = nn.ModuleDict({"model": task.setup.model, "task": task.modules})
    return dict(whole.named_parameters())


def learn(task: Contrast, items: list[Item]) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """Loss, figures and gradients of a step of all ranks; without items a blank batch, as the loop gives it."""
    ranks, model = task.setup.ranks, task.setup.model
    own = task.totals(items)
    totals = dict(zip(own, ranks.sum(torch.tensor(list(own.values()), dtype=torch.float64)).tolist(), strict=True))
    blank = Batch(Packed(torch.ones(2, dtype=torch.int64), Layout((2,))), labels=torch.full((2,), -100))
    batch = Batch.concat([item.batch for item in items]) if items else blank
    loss, figures = task.loss(model.train(), items, batch, totals)
    (loss * ranks.size).backward()
    grads = {}
    for name, parameter in trained(task).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        grads[name] = ranks.sum(parameter.grad / ranks.size)
        parameter.grad = None
    told = {name: float(ranks.sum(torch.as_tensor(value))) / (totals[name] or 1) for name, value in figures.items()}
    return float(ranks.sum(loss.detach())), told, grads


def written_out(task: Contrast, items: list[Item]) -> tuple[Tensor, Tensor]:
    """SigLIP and caption, image by image and pair by pair."""
    model, heads = task.setup.model, task.modules
    images, texts, losses, count = [], [], [], 0
    for item in items:
        assert item.batch.patches is not None
        features = model.vision(item.batch.patches.to(torch.float64))
        images.append(F.normalize(heads.image_proj(heads.image_pool(features)), dim=-1)[0])
        ids = torch.tensor(item.extra["ids"])
        encoded = heads.text_pool(heads.text(Packed(ids, Layout((len(ids),)))))
        texts.append(F.normalize(heads.text_proj(encoded), dim=-1)[0])
        out = model(item.batch)
        assert out.loss is not None
        losses.append(out.loss * out.num_targets)
        count += out.num_targets
    scale, bias = heads.similarity.log_scale.exp(), heads.similarity.bias
    pairs = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            if i == j or TEXTS[i] != TEXTS[j]:
                pairs = pairs - F.logsigmoid((1 if i == j else -1) * (scale * (image @ text) + bias))
    return pairs / len(items), torch.stack(losses).sum() / count


def test_the_loss_is_siglip_plus_weighted_captions_with_gradients() -> None:
    task = make()
    items = items_of(task)
    contrastive, caption = written_out(task, items)
    parameters = trained(task)
    wanted = torch.autograd.grad(contrastive + 2.0 * caption, list(parameters.values()))
    loss, figures, grads = learn(task, items)
    assert_close(loss, float((contrastive + 2.0 * caption).detach()), rtol=1e-12, atol=0)
    assert_close(
        figures, {"contrastive": float(contrastive.detach()), "caption": float(caption.detach())}, rtol=1e-12, atol=0
    )
    for (name, found), want in zip(grads.items(), wanted, strict=True):
        assert_close(found, want, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_the_tower_runs_once() -> None:
    task, calls = make(), []
    task.setup.model.vision.register_forward_hook(lambda *_: calls.append(1))
    learn(task, items_of(task))
    assert len(calls) == 1


def test_the_caption_weight_counts() -> None:
    found = []
    for weight in (0.0, 2.0, 5.0):
        task = make(OPTIONS.replace(caption_weight=weight))
        found.append(learn(task, items_of(task))[0])
    assert found[1] - found[0] == pytest.approx(2 / 5 * (found[2] - found[0]))
    assert found[1] > found[0] + 1


def test_a_prompt_stands_between_image_and_caption() -> None:
    plain, asked = (make(OPTIONS.replace(prompt=prompt)).prepare(samples()[1], NoDraw()) for prompt in ("", "what?"))
    assert asked.num_tokens > plain.num_tokens
    assert asked.extra == plain.extra
    assert asked.batch.labels is not None
    assert plain.batch.labels is not None
    assert [i for i in asked.batch.labels.tolist() if i != -100] == [
        i for i in plain.batch.labels.tolist() if i != -100
    ]


def test_measuring_is_preparing_without_pixels() -> None:
    task = make()
    for sample, item in zip(samples(), items_of(task), strict=True):
        assert task.measure(sample, NoDraw()) == (item.num_tokens, item.num_patches)


def test_images_follow_the_resolution_of_the_run() -> None:
    """The same samples under a cap have fewer patches, and are measured so."""
    small = make(resolution={"points": [[0.0, 300]]})
    for sample, whole in zip(samples(), items_of(make()), strict=True):
        item = small.prepare(sample, NoDraw())
        assert item.num_patches < whole.num_patches
        assert small.measure(sample, NoDraw()) == (item.num_tokens, item.num_patches)


def on_ranks(rank: int, shares: tuple[tuple[int, ...], ...], exchange: str) -> Any:
    import torch.distributed as dist

    ranks = Ranks(rank, len(shares), torch.device("cpu"), dist.group.WORLD)
    task = make(OPTIONS.replace(exchange=exchange, chunk=2), ranks)
    items = items_of(task)
    return learn(task, [items[i] for i in shares[rank]])


@pytest.mark.parametrize(
    ("shares", "exchange"),
    [
        (((0, 1, 2), (3, 4)), "ring"),
        pytest.param(((0, 1, 2, 3, 4), ()), "gather", marks=pytest.mark.slow),
        pytest.param(((0, 1), (), (2, 3, 4)), "ring", marks=pytest.mark.slow),
    ],
)
def test_ranks_share_one_loss(shares: tuple[tuple[int, ...], ...], exchange: str) -> None:
    """Also unequal shares, a rank without a pair, and equal texts on two ranks."""
    task = make()
    loss, figures, grads = learn(task, items_of(task))
    for theirs in run_ranks(on_ranks, len(shares), shares, exchange):
        assert_close(theirs[0], loss, rtol=1e-12, atol=0)
        assert_close(theirs[1], figures, rtol=1e-12, atol=0)
        assert_close(theirs[2], grads, rtol=1e-9, atol=1e-12)


def test_a_step_without_samples_has_gradients_of_zero() -> None:
    task = make()
    loss, _, grads = learn(task, [])
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_the_heads_are_drawn_from_the_seed_alone() -> None:
    first = make().modules.state_dict()
    torch.randn(3)
    assert all(torch.equal(value, first[name]) for name, value in make().modules.state_dict().items())
    other = make(seed=1).modules
    assert not torch.equal(other.image_proj.weight, first["image_proj.weight"])


def test_heads_come_back_from_their_folder(tmp_path: Path) -> None:
    heads = make().modules.float()
    heads.save_pretrained(tmp_path / "heads")
    loaded = ContrastHeads.from_pretrained(tmp_path / "heads")
    assert loaded.config == heads.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in heads.state_dict().items())
    config = tmp_path / "heads/config.json"
    config.write_text(config.read_text().replace('"dim": 12', '"dim": 13'))
    with pytest.raises(KeyMismatchError, match=r"image_proj.weight is \(12, 32\) in the file and \(13, 32\)"):
        ContrastHeads.from_pretrained(tmp_path / "heads")
    (tmp_path / "heads/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ContrastHeads.from_pretrained(tmp_path / "heads")


def test_mistakes_are_named() -> None:
    task = make()
    with pytest.raises(SampleError, match=r"an image and its text are expected .*, and this is a conversation"):
        task.prepare({"messages": []}, NoDraw())
    with pytest.raises(ConfigError, match="32 wide, no multiple of pool_heads=5"):
        make(OPTIONS.replace(pool_heads=5))
    with pytest.raises(
        ConfigError, match=r"the whole of its text: set data\.too_long to 'refuse' or 'skip', not to 'cut'"
    ):
        make(data={"files": ["-"], "max_tokens": 5, "too_long": "cut"})
    items = items_of(task)
    both = Item(Batch.concat([items[0].batch, items[1].batch]), items[0].extra)
    with pytest.raises(PlaceholderMismatchError, match="1 samples have 2 images"):
        learn(task, [both])


def test_equal_texts_have_equal_keys() -> None:
    assert text_key("a cat") == text_key("a " + "cat")
    assert len({text_key(str(number)) for number in range(1000)}) == 1000
    assert 0 <= text_key("a cat") < 2**63
