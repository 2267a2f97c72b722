"""What holds for every decoder: packing, cache, checkpointing, compilation, a fresh start, and mistakes that are named."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from vlkit.errors import LayoutError, SequenceTooLongError, TokenError
from vlkit.llm.decoder import Decoder
from vlkit.llm.moonlight import build_moonlight
from vlkit.llm.output import Deep
from vlkit.llm.qwen3 import build_qwen3
from vlkit.packing import Layout, Packed
from vlkit.registry import component

NAMES = ("llama-tiny", "qwen-tiny", "qwen2-tiny", "qwen3-tiny", "qwen3-moe-tiny", "moonlight-tiny")
GRIDS = {
    "blocks": ("qwen2-tiny", {"rope_sections": (2, 3, 3), "num_layers": 4, "theta": 20.0}),
    "turns": ("qwen3-moe-tiny", {"rope_sections": (3, 1, 1), "rope_interleaved": True, "num_layers": 4, "theta": 20.0}),
}
LENGTHS = (7, 1, 12, 3)


def make(name: str, **changes: object) -> Decoder:
    part = component("llm", name)
    torch.manual_seed(0)
    model = part.module(part.configs[name].replace(**changes)).double()
    for parameter in model.parameters():  # larger than at the start, so that nothing hides behind small numbers
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids_of(model: Decoder, lengths: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def hidden(model: Decoder, ids: torch.Tensor, lengths: tuple[int, ...], **more: Any) -> torch.Tensor:
    return model(Packed(model.embed(ids), Layout(lengths)), **more).hidden.tokens


def positions_with_images(lengths: tuple[int, ...]) -> torch.Tensor:
    """(time, row, column) where every sequence is one token of text, an image of 2 x 2 tokens, and text from there on."""
    start = [(0, 0, 0), (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2)]
    return torch.tensor([place for n in lengths for place in (start + [(3 + i,) * 3 for i in range(n)])[:n]])


def deep_features(model: Decoder, num_tokens: int, seed: int = 0) -> Deep:
    """Three features at every third token; gradients reach them."""
    rows = torch.arange(seed % 2, num_tokens, 3)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, len(rows), model.config.dim, generator=generator, dtype=torch.float64)
    return Deep(rows, tuple(features.requires_grad_()))


def gradients(model: Decoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_alone_with_gradients(name: str) -> None:
    model = make(name)
    ids = ids_of(model, LENGTHS)
    together = model.head(hidden(model, ids, LENGTHS))
    alone = torch.cat([model.head(hidden(model, part, (len(part),))) for part in ids.split(LENGTHS)])
    assert (together - alone).abs().max() <= 1e-13 * alone.abs().max()
    ours, theirs = gradients(model, together.square().sum()), gradients(model, alone.square().sum())
    for key, grad in ours.items():
        assert grad.any(), key
        assert (grad - theirs[key]).abs().max() <= 1e-12 * theirs[key].abs().max(), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_other_text_in_one_sequence_changes_no_bit_of_another(name: str, dtype: torch.dtype) -> None:
    model = make(name).to(dtype)
    first, second = ids_of(model, LENGTHS), ids_of(model, LENGTHS)
    second[8:20] = ids_of(model, LENGTHS, seed=1)[8:20]
    with torch.no_grad():
        a, b = (hidden(model, ids, LENGTHS).split(LENGTHS) for ids in (first, second))
    assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_with_cache_is_without_through_select(name: str) -> None:
    """Unequal prompts, an unequal chunk, single tokens, and a sequence that ends on the way."""
    model = make(name)
    ids = ids_of(model, LENGTHS)
    texts = ids.split(LENGTHS)
    done = {0: 0, 2: 0}
    with torch.no_grad():
        want = hidden(model, ids, LENGTHS).split(LENGTHS)
        cache = model.new_cache(2, 3, dtype=torch.float64)
        for new in [(4, 8), (2, 1), (1, 1), (0, 1), (0, 1)]:
            if new[0] == 0 and 0 in done:
                cache.select([1])
                del done[0]
            step = {i: n for i, n in zip((0, 2), new, strict=True) if n}
            fresh = torch.cat([texts[i][done[i] : done[i] + n] for i, n in step.items()])
            packed = Packed(model.embed(fresh), Layout(tuple(step.values())))
            rows = model(packed, cache=cache).hidden.tokens.split(list(step.values()))
            for (i, n), part in zip(step.items(), rows, strict=True):
                assert torch.allclose(part, want[i][done[i] : done[i] + n], rtol=0, atol=1e-11)
                done[i] += n
    assert cache.lengths == [12]


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_bit(name: str) -> None:
    model = make(name)
    ids = ids_of(model, LENGTHS)
    plain = hidden(model, ids, LENGTHS)
    want = gradients(model, model.head(plain).square().sum())
    model.gradient_checkpointing = True
    runs = []
    model.blocks[1].attn.register_forward_hook(lambda *_: runs.append(1))
    again = hidden(model, ids, LENGTHS)
    got = gradients(model, model.head(again).square().sum())
    assert len(runs) == 2, "the block was not run again in the backward"
    assert torch.equal(plain, again)
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("grid", GRIDS)
def test_equal_coordinates_are_one_coordinate(grid: str) -> None:
    """Bit for bit, and as a decoder without sections; other rows or columns give something else."""
    name, changes = GRIDS[grid]
    model = make(name, **changes)
    ids = ids_of(model, LENGTHS)
    line = Layout(LENGTHS).positions()
    cube = line[:, None].expand(-1, 3)
    with torch.no_grad():
        want = hidden(model, ids, LENGTHS)
        assert torch.equal(hidden(model, ids, LENGTHS, positions=cube), want)
        assert torch.equal(hidden(make(name, num_layers=4, theta=20.0), ids, LENGTHS), want)
        for axis in range(3):
            moved = cube.clone()
            moved[4, axis] += 1
            assert not torch.allclose(hidden(model, ids, LENGTHS, positions=moved)[4], want[4], atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_decoding_after_images_is_one_forward_over_all(grid: str) -> None:
    """Positions on a grid and deep features in the prefill, then text without any, through select."""
    name, changes = GRIDS[grid]
    model = make(name, **changes)
    ids, positions = ids_of(model, LENGTHS), positions_with_images(LENGTHS)
    deep = deep_features(model, sum(LENGTHS))
    first = {0: 5, 2: 6}  # of the sequences of 7 and 12 tokens: their images are in the first 5
    starts = {0: 0, 2: 8}
    with torch.no_grad():
        within = (deep.rows < 5) | ((deep.rows >= 8) & (deep.rows < 13))
        deep = Deep(deep.rows[within], tuple(features[within] for features in deep.features))
        want = hidden(model, ids, LENGTHS, positions=positions, deep=deep)
        taken = torch.cat([torch.arange(starts[i], starts[i] + first[i]) for i in first])
        rows = torch.tensor([taken.tolist().index(row) for row in deep.rows])
        cache = model.new_cache(2, 3, dtype=torch.float64)
        more = {"positions": positions[taken], "deep": Deep(rows, deep.features), "cache": cache}
        assert torch.allclose(hidden(model, ids[taken], (5, 6), **more), want[taken], rtol=0, atol=1e-11)
        assert cache.next_positions == [int(positions[starts[i] + first[i] - 1].max()) + 1 for i in first]
        assert cache.next_positions != cache.lengths
        step = torch.tensor([5, 6, 8 + 6, 8 + 7, 8 + 8])
        assert torch.allclose(hidden(model, ids[step], (2, 3), cache=cache), want[step], rtol=0, atol=1e-11)
        cache.select([1])
        for row in range(8 + 9, 8 + 12):
            got = hidden(model, ids[row : row + 1], (1,), cache=cache)
            assert torch.allclose(got, want[row : row + 1], rtol=0, atol=1e-11)
    assert cache.prompt_lengths == [6]


def test_deep_features_join_the_outputs_of_the_first_layers() -> None:
    """By definition: each layer's blocks run one by one, with the features added between."""
    model = make("qwen3-tiny", num_layers=4)
    ids, deep = ids_of(model, LENGTHS), deep_features(model, sum(LENGTHS))
    outs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, result: outs.append((args[0], result[0])))
    hidden(model, ids, LENGTHS, deep=deep)
    for layer, ((_, out), (following, _)) in enumerate(itertools.pairwise(outs)):
        expected = out.clone()
        if layer < 3:
            expected[deep.rows] += deep.features[layer]
        assert torch.equal(following, expected)
    assert len(outs) == 4


@pytest.mark.parametrize("grid", GRIDS)
def test_checkpointing_with_images_changes_no_bit(grid: str) -> None:
    name, changes = GRIDS[grid]
    model = make(name, **changes)
    ids, deep = ids_of(model, LENGTHS), deep_features(model, sum(LENGTHS))
    results = []
    for model.gradient_checkpointing in (False, True):
        out = hidden(model, ids, LENGTHS, positions=positions_with_images(LENGTHS), deep=deep)
        loss = model.head(out).square().sum()
        results.append([out, *torch.autograd.grad(loss, [*deep.features, *model.parameters()])])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert all(features.any() for features in results[0][1:4])


def test_block_stack_with_images_compiles_once_for_all_lengths() -> None:
    model = make("qwen2-tiny", rope_sections=(2, 3, 3))
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    model.forward_blocks = torch.compile(model.forward_blocks, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, lengths in enumerate([(7, 1, 11), (13, 5), (9, 2, 2, 2, 6)]):
            ids, deep = ids_of(model, lengths, seed), deep_features(model, sum(lengths), seed)
            deep = Deep(deep.rows, deep.features[:1])
            more = {"positions": positions_with_images(lengths), "deep": deep}
            got, want = hidden(model, ids, lengths, **more), hidden(eager, ids, lengths, **more)
            assert torch.allclose(got, want, rtol=0, atol=1e-11)
            ours, theirs = (torch.autograd.grad(each.square().sum(), deep.features) for each in (got, want))
            for grad, expected in zip(ours, theirs, strict=True):
                assert (grad - expected).abs().max() <= 1e-11 * expected.abs().max()
    torch._dynamo.reset()


def test_positions_can_be_given() -> None:
    model = make("moonlight-tiny")
    ids = ids_of(model, (5, 3))
    with torch.no_grad():
        packed = Packed(model.embed(ids), Layout((5, 3)))
        own = model(packed, positions=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])).hidden.tokens
        shifted = model(packed, positions=torch.tensor([5, 6, 7, 8, 9, 0, 1, 2])).hidden.tokens
        stretched = model(packed, positions=torch.tensor([0, 1, 2, 3, 9, 0, 1, 2])).hidden.tokens
    assert torch.equal(own, model(packed).hidden.tokens)
    assert torch.allclose(own, shifted, rtol=0, atol=1e-12)  # only distances count
    assert not torch.allclose(own[4], stretched[4], atol=1e-3)
    assert torch.equal(own[5:], stretched[5:])


@pytest.mark.parametrize("name", NAMES)
def test_meta_then_empty_then_reset_is_a_fresh_model(name: str) -> None:
    part = component("llm", name)
    config = part.configs[name]
    with torch.device("meta"):
        model = part.module(config)
    model = model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    for module in reversed(list(model.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert list(model.state_dict()) == list(part.module(config).state_dict())
    for key, tensor in model.state_dict().items():
        if "norm" in key:
            assert torch.equal(tensor, torch.ones_like(tensor)), key
        elif key.endswith(".bias"):
            assert not tensor.any(), key
        else:
            assert 0.015 < float(tensor.std()) < 0.025, key


def test_what_one_token_does_not_use_is_not_active() -> None:
    model = component("llm", "moonlight-tiny").module(component("llm", "moonlight-tiny").configs["moonlight-tiny"])
    assert model.inactive_parameters() == 1 * (5 - 2) * 3 * 32 * 24
    assert make("qwen3-tiny").inactive_parameters() == 0


def test_published_moonlight_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        model = build_moonlight(component("llm", "moonlight").configs["moonlight-kimi-vl"])
    biases = sum(buffer.numel() for buffer in model.buffers())
    total = sum(p.numel() for p in model.parameters()) + biases
    assert (total, biases) == (15_960_110_208, 1664)
    assert total - model.inactive_parameters() == 2_914_776_192


def test_latent_cache_is_a_ninth_of_keys_and_values() -> None:
    """At Kimi-VL's sizes: 512 + 64 numbers per token and layer, where 16 heads would keep 16 x (192 + 128)."""
    config = component("llm", "moonlight").configs["moonlight-kimi-vl"]
    with torch.device("meta"):
        model = build_moonlight(config)
    cache = model.new_cache(2, 4096, dtype=torch.bfloat16, device="meta")
    per_token = cache.num_bytes / (2 * 4096)
    assert per_token == 27 * (512 + 64) * 2 == 31_104
    expanded = 27 * 2 * sum(config.num_heads * n for n in (config.nope_dim + config.rope_dim, config.value_dim))
    assert per_token <= expanded / 8


def test_published_configs_differ_where_they_should() -> None:
    configs = component("llm", "moonlight").configs
    assert configs["moonlight"] == configs["moonlight-16b-a3b"]
    assert (configs["moonlight"].theta, configs["moonlight"].max_positions) == (50000.0, 8192)
    assert configs["moonlight-kimi-vl"] == configs["moonlight"].replace(theta=800000.0, max_positions=131072)
    with torch.device("meta"):
        large = build_qwen3(component("llm", "qwen3").configs["qwen3-30b-a3b"])
    assert sum(p.numel() for p in large.parameters()) == 30_532_122_624


def test_mistakes_are_named() -> None:
    model = make("qwen3-tiny", max_positions=6)
    with pytest.raises(TokenError, match=r"320.*vocabulary of 320"):
        model.embed(torch.tensor([5, 320]))
    with pytest.raises(TokenError, match="-1"):
        model.embed(torch.tensor([5, -1]))
    with pytest.raises(SequenceTooLongError, match=r"sequence 1 has 7 tokens.*6 positions"):
        hidden(model, ids_of(model, (2, 7)), (2, 7))
    with pytest.raises(SequenceTooLongError, match=r"0 to 6.*0 to 5"):
        model(Packed(model.embed(ids_of(model, (2,))), Layout((2,))), positions=torch.tensor([0, 6]))
    two = ids_of(model, (2,))
    with pytest.raises(LayoutError, match="one per token, 2"):
        hidden(model, two, (2,), positions=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(LayoutError, match=r"one per token, 2.*rope_sections"):
        hidden(model, two, (2,), positions=torch.zeros(2, 3, dtype=torch.int64))
    rows = torch.tensor([0])
    with pytest.raises(LayoutError, match=r"\(1, 31\).*2 of shape \(1, 32\)"):
        hidden(model, two, (2,), deep=Deep(rows, (torch.zeros(1, 31),)))
    with pytest.raises(LayoutError, match="at most 2"):
        hidden(model, two, (2,), deep=Deep(rows, (torch.zeros(1, 32),) * 3))
    cache = model.new_cache(1, 6, dtype=torch.float64)
    with torch.no_grad():
        hidden(model, two, (2,), positions=torch.tensor([0, 4]), cache=cache)
        with pytest.raises(SequenceTooLongError, match=r"sequence 0 goes on to position 6.*0 to 5"):
            hidden(model, two, (2,), cache=cache)
    cache = model.new_cache(1, 6, dtype=torch.float64)
    with torch.no_grad():
        model(Packed(model.embed(ids_of(model, (6,))), Layout((6,))), cache=cache)
        with pytest.raises(SequenceTooLongError, match="7 tokens"):
            model(Packed(model.embed(ids_of(model, (1,))), Layout((1,))), cache=cache)
