"""How images and text meet: placeholders item by item, the padded form of the Hub, loss and counts."""

from __future__ import annotations

import pytest
import torch

import vlkit
from vlkit.errors import LayoutError, PlaceholderMismatchError
from vlkit.models import VisionLanguageModel
from vlkit.packing import Batch, Layout, Packed
from vlkit.testing import random_batch, random_patches


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    return vlkit.create_model("kimi-vl-tiny")


def batch_of(model: VisionLanguageModel, sequences: list[list[int]], grids: list[tuple[int, int]]) -> Batch:
    """Sequences of ids, where -1 is a placeholder, and images by their grids in patches."""
    ids = torch.tensor([model.config.image_token_id if i < 0 else i for s in sequences for i in s])
    layout = Layout(tuple(len(s) for s in sequences))
    return Batch(Packed(ids, layout), random_patches(grids, model.config.vision.patch_dim))  # type: ignore[attr-defined]


def test_adjacent_images_share_a_run(model: VisionLanguageModel) -> None:
    """Two images without text between them: each takes its own part of the run, in order."""
    batch = batch_of(model, [[1, -1, -1, -1, 2]], [(2, 2), (2, 4)])
    with torch.no_grad():
        embedded = model.embed(batch)[0].tokens
        images = model.encode_images(batch.patches).tokens  # type: ignore[arg-type]
    assert torch.equal(embedded[1:4], images)


def test_an_image_never_spans_two_sequences(model: VisionLanguageModel) -> None:
    """The total is right, but one image would begin in one sequence and end in the next."""
    batch = batch_of(model, [[1, 2, -1, -1], [-1, -1, 3]], [(2, 6), (2, 2)])
    with pytest.raises(
        PlaceholderMismatchError, match=r"image 0: the text has 2 placeholders but the image gives 3 tokens"
    ):
        model(batch)


def test_an_image_never_spans_text(model: VisionLanguageModel) -> None:
    batch = batch_of(model, [[1, -1, 2, -1, 3]], [(2, 4)])
    with pytest.raises(PlaceholderMismatchError, match="image 0: the text has 1 placeholders but the image gives 2"):
        model(batch)


def test_more_placeholders_than_images_are_counted(model: VisionLanguageModel) -> None:
    batch = batch_of(model, [[1, -1, 2, -1, 3]], [(2, 2)])
    with pytest.raises(PlaceholderMismatchError, match="2 placeholders in 2 runs, the 1 images give 1"):
        model(batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pack_takes_padded_batches(model: VisionLanguageModel, side: str) -> None:
    """Padding on either side gives the packed batch, and its logits."""
    batch = random_batch(model)
    length = batch.ids.layout.max_length + 2
    rows = len(batch.ids.layout.lengths)
    ids, mask, labels = (
        torch.zeros(rows, length, dtype=torch.long),
        torch.zeros(rows, length),
        torch.full((rows, length), 7),
    )
    assert batch.labels is not None
    for row, (item, label) in enumerate(
        zip(batch.ids.unpack(), batch.labels.split(list(batch.ids.layout.lengths)), strict=True)
    ):
        where = slice(length - len(item), length) if side == "left" else slice(0, len(item))
        ids[row, where], mask[row, where], labels[row, where] = item, 1, label
    assert batch.patches is not None
    assert batch.patches.layout.grids is not None
    size, channels = model.config.vision.patch_size, model.config.vision.in_channels  # type: ignore[attr-defined]
    packed = model.pack(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=batch.patches.tokens.view(-1, channels, size, size),
        image_grid_hws=torch.tensor([grid[1:] for grid in batch.patches.layout.grids]),
        labels=labels,
    )
    assert packed.ids.layout == batch.ids.layout
    with torch.no_grad():
        ours, theirs = model(packed), model(batch)
    assert torch.equal(ours.logits.tokens, theirs.logits.tokens)
    assert ours.loss == theirs.loss


def test_pack_names_what_contradicts(model: VisionLanguageModel) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    pixels, grids = torch.zeros(8, model.config.vision.patch_dim), torch.tensor([[2, 4]])  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match=r"labels is \[1, 3\], input_ids is \[1, 4\]"):
        model.pack(input_ids=ids, labels=ids[:, :3])
    with pytest.raises(LayoutError, match="make 8 patches, pixel_values has 7 rows"):
        model.pack(input_ids=ids, pixel_values=pixels[:7], image_grid_hws=grids)
    with pytest.raises(LayoutError, match="come together"):
        model.pack(input_ids=ids, pixel_values=pixels)
    with pytest.raises(LayoutError, match="not both"):
        model.pack(input_ids=ids, pixel_values=pixels, image_grid_hws=grids, image_grid_thw=torch.tensor([[1, 2, 4]]))
    with pytest.raises(TypeError, match="image_grids"):
        model.pack(input_ids=ids, image_grids=grids)  # type: ignore[call-arg]


def test_loss_is_the_mean_over_labelled_tokens(model: VisionLanguageModel) -> None:
    """Equal to cross-entropy on full logits, shifted inside each sequence."""
    batch = random_batch(model)
    assert batch.labels is not None
    out = model(batch)
    logits, labels = out.unpack(), batch.labels.split(list(batch.ids.layout.lengths))
    shifted = torch.cat([x[:-1] for x in logits]).float()
    targets = torch.cat([x[1:] for x in labels])
    want = torch.nn.functional.cross_entropy(shifted, targets, ignore_index=-100)
    assert out.num_targets == int((targets != -100).sum())
    torch.testing.assert_close(out.loss, want, rtol=2e-6, atol=0)


def test_a_batch_without_labels_or_targets(model: VisionLanguageModel) -> None:
    batch = random_batch(model, labels=False)
    assert model(batch).loss is None
    silent = Batch(batch.ids, batch.patches, labels=torch.full_like(batch.ids.tokens, -100))
    out = model(silent)
    assert (out.loss.item(), out.num_targets) == (0.0, 0)
    out.loss.backward()
    assert not model.llm.head_weight.grad.any()
    model.zero_grad(set_to_none=True)


def test_logits_follow_the_grad_mode_of_the_forward(model: VisionLanguageModel) -> None:
    with torch.no_grad():
        out = model(random_batch(model))
    assert not out.logits.tokens.requires_grad
    assert model(random_batch(model)).logits.tokens.requires_grad


def test_expert_load_counts_every_choice(model: VisionLanguageModel) -> None:
    batch = random_batch(model)
    load = model(batch).expert_load
    assert load is not None
    assert load.shape == (1, 5)
    assert int(load.sum()) == 2 * batch.ids.layout.num_tokens
    dense = vlkit.create_model("moonvit-qwen3-tiny")
    assert dense(random_batch(dense)).expert_load is None


def test_frozen_vision_does_not_run_for_text(model: VisionLanguageModel) -> None:
    """The blank image of a text batch is there for gradients only."""
    calls = []
    handle = model.vision.register_forward_hook(lambda *_: calls.append(1))
    text = random_batch(model, [(4, [])])
    with torch.no_grad():
        model(text)
    model.vision.requires_grad_(False)
    model.projector.requires_grad_(False)
    model(text)
    assert not calls
    model.requires_grad_(True)
    model(text)
    assert calls
    handle.remove()
