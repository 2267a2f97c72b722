"""LLaMA, Qwen2, and the text models of Qwen2-VL and Qwen3-VL with positions on a grid, against transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.decoders import assert_same_gradients, hub_sizes, published, randomise
from vlkit.hub.keymap import KeyMap
from vlkit.llm import llama, qwen2, qwen3
from vlkit.llm.decoder import Decoder
from vlkit.llm.llama import LlamaConfig
from vlkit.llm.output import Deep
from vlkit.llm.qwen2 import Qwen2Config
from vlkit.llm.qwen3 import Qwen3Config
from vlkit.packing import Layout, Packed
from vlkit.registry import component

transformers = pytest.importorskip("transformers")

LENGTHS = (6, 1, 17, 3)
SMALL = {"vocab_size": 61, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "mlp_dim": 45, "max_positions": 64}


@dataclass(frozen=True)
class Case:
    """A config, and what transformers calls its model and the fields beyond `hub_sizes`."""

    part: Any  # the module with `keys`
    build: Any
    config: Any
    model: str
    more: dict[str, Any]

    def made(self) -> tuple[Decoder, torch.nn.Module, KeyMap]:
        """Ours and theirs with the same weights, and the names between them."""
        theirs_class = getattr(transformers, self.model)
        theirs = randomise(theirs_class(theirs_class.config_class(**hub_sizes(self.config), **self.more)))
        ours = self.build(self.config)
        keys = self.part.keys(self.config)
        ours.load_state_dict(keys.to_ours(self.names(theirs.state_dict())))
        return ours, theirs, keys

    def names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The names of the checkpoint: with a prefix, and no head where it is tied."""
        if self.model.endswith("TextModel"):
            state = {f"model.{name}": tensor for name, tensor in state.items()}
        return {name: t for name, t in published(state).items() if not (self.config.tied and name == "lm_head.weight")}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


LINES = {
    "llama": Case(
        llama, llama.build_llama, LlamaConfig(**SMALL, dim=30, head_dim=10, tied=False), "LlamaForCausalLM",
        {"head_dim": 10, "tie_word_embeddings": False, **rope(1e5)},
    ),
    "llama-tied": Case(
        llama, llama.build_llama, LlamaConfig(**SMALL, dim=30, head_dim=10), "LlamaForCausalLM",
        {"head_dim": 10, "tie_word_embeddings": True, **rope(1e5)},
    ),
    "qwen2": Case(
        qwen2, qwen2.build_qwen2, Qwen2Config(**SMALL, dim=60, tied=False), "Qwen2ForCausalLM",
        {"tie_word_embeddings": False, **rope(1e6)},
    ),
}  # fmt: skip

# Without a head: tied on our side, so that there is none to load.
EXPERTS = {"num_experts": 7, "top_k": 3, "expert_dim": 18}
GRIDS = {
    "qwen2-vl": Case(
        qwen2, qwen2.build_qwen2, Qwen2Config(**SMALL, dim=96, rope_sections=(2, 3, 3), theta=100.0),
        "Qwen2VLTextModel", rope(100.0, mrope_section=[2, 3, 3]),
    ),
    "qwen3-vl": Case(
        qwen3, qwen3.build_qwen3,
        Qwen3Config(**SMALL, dim=28, head_dim=16, rope_sections=(4, 2, 2), rope_interleaved=True, theta=100.0),
        "Qwen3VLTextModel", {"head_dim": 16, **rope(100.0, mrope_section=[4, 2, 2], mrope_interleaved=True)},
    ),
    "qwen3-vl-moe": Case(
        qwen3, qwen3.build_qwen3,
        Qwen3Config(
            **SMALL, **EXPERTS, dim=28, head_dim=16, rope_sections=(4, 2, 2), rope_interleaved=True, theta=100.0
        ),
        "Qwen3VLMoeTextModel",
        {
            "head_dim": 16, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 18,
            "norm_topk_prob": True, "mlp_only_layers": [], "experts_implementation": "eager",
            **rope(100.0, mrope_section=[4, 2, 2], mrope_interleaved=True),
        },
    ),
}  # fmt: skip


def ids_of(*lengths: int) -> Tensor:
    return torch.randint(61, (sum(lengths),), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LINES)
def test_packed_logits_and_gradients_are_those_of_the_reference_one_by_one(name: str) -> None:
    case = LINES[name]
    ours, theirs, keys = case.made()
    assert set(keys.to_theirs(ours.state_dict())) == set(case.names(theirs.state_dict()))
    ids = ids_of(*LENGTHS)

    logits = ours.head(ours(Packed(ours.embed(ids), Layout(LENGTHS))).hidden.tokens)
    want = torch.cat([theirs(part[None]).logits[0] for part in ids.split(LENGTHS)])
    assert (logits - want).abs().max() <= 1e-5 * want.abs().max()  # fp32, 3 layers: largest seen 1e-6

    assert_same_gradients(ours, logits.square().sum(), theirs, want.square().sum(), keys, case.names)


def positions_of(*lengths: int) -> Tensor:
    """(time, row, column) that differ everywhere; the last of each sequence is its highest, so that text follows."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(20, (sum(lengths), 3), generator=generator)
    positions[torch.tensor(lengths).cumsum(0) - 1] = torch.tensor([21, 20, 19])
    return positions


@pytest.mark.parametrize("name", GRIDS)
def test_grid_positions_and_deep_features_are_those_of_the_reference(name: str) -> None:
    case = GRIDS[name]
    ours, theirs, keys = case.made()
    ids, positions = ids_of(*LENGTHS), positions_of(*LENGTHS)
    deep = None
    if "qwen3" in name:  # two features for three layers, at every second token
        rows = torch.arange(0, len(ids), 2)
        deep = Deep(rows, tuple(torch.randn(2, len(rows), case.config.dim).requires_grad_().unbind()))

    hidden = ours(Packed(ours.embed(ids), Layout(LENGTHS)), positions=positions, deep=deep).hidden.tokens
    want, start = [], 0
    for part, where in zip(ids.split(LENGTHS), positions.split(LENGTHS), strict=True):
        more = {}
        if deep is not None:
            inside = (deep.rows >= start) & (deep.rows < start + len(part))
            visual = torch.zeros(len(part), dtype=torch.bool)
            visual[deep.rows[inside] - start] = True
            more = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": [f[inside] for f in deep.features]}
        out = theirs(input_ids=part[None], position_ids=where.T[:, None], use_cache=False, **more)
        want.append(out.last_hidden_state[0])
        start += len(part)
    expected = torch.cat(want)
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()  # fp32, 3 layers: largest seen 1e-6

    if deep is not None:
        ours_of_deep, want_of_deep = (
            torch.autograd.grad(loss.square().sum(), deep.features, retain_graph=True) for loss in (hidden, expected)
        )
        for grad, wanted in zip(ours_of_deep, want_of_deep, strict=True):
            assert (grad - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert_same_gradients(ours, hidden.square().sum(), theirs, expected.square().sum(), keys, case.names)


@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_decoding_after_images_is_the_reference_over_everything(name: str) -> None:
    """Prefill of unequal sequences with positions on a grid, then text without any; the reference has no cache."""
    ours, theirs, _ = GRIDS[name].made()
    ours, theirs = ours.double(), theirs.double()
    prompts, more = (9, 5, 12), 3
    ids = [torch.randint(61, (n + more,), generator=torch.Generator().manual_seed(n)) for n in prompts]
    positions = positions_of(*prompts).split(prompts)
    after = 22 + torch.arange(more)[:, None].expand(-1, 3)
    want = [
        theirs(input_ids=text[None], position_ids=torch.cat([where, after]).T[:, None], use_cache=False)
        .last_hidden_state[0, -more:]
        for text, where in zip(ids, positions, strict=True)
    ]  # fmt: skip
    cache = ours.new_cache(3, 4, dtype=torch.float64)  # too small: it has to grow
    embeddings = ours.embed(torch.cat([text[:-more] for text in ids]))
    ours(Packed(embeddings, Layout(prompts)), positions=torch.cat(positions), cache=cache)
    for step in range(more):
        packed = Packed(ours.embed(torch.stack([text[step - more] for text in ids])), Layout((1, 1, 1)))
        for got, expected in zip(ours(packed, cache=cache).hidden.tokens, want, strict=True):
            # fp64, the reference's angles are fp32: largest seen 1.1e-6
            assert (got - expected[step]).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # As Qwen2-1.5B, Qwen2-7B and Qwen2.5-3B were published.
        ("qwen2-vl-2b", 1_543_714_304),
        ("qwen2-vl-7b", 7_615_616_512),
        ("qwen2.5-vl-3b", 3_085_938_688),
    ],
)
def test_published_sizes_have_the_published_parameter_counts(name: str, count: int) -> None:
    part = component("llm", name)
    with torch.device("meta"):
        assert sum(p.numel() for p in part.module(part.configs[name]).parameters()) == count
