"""Moonlight against transformers' deepseek_v3, and against numbers worked out by hand-written code in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlkit.hub.keymap import KeyMap
from vlkit.layers.moe import Router
from vlkit.llm.decoder import Decoder
from vlkit.llm.moonlight import MoonlightConfig, build_moonlight, keys
from vlkit.packing import Layout, Packed

transformers = pytest.importorskip("transformers")

LENGTHS = (7, 1, 13, 4)


def reference(config: MoonlightConfig) -> torch.nn.Module:
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            moe_intermediate_size=config.expert_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            n_shared_experts=config.num_shared_experts,
            n_routed_experts=config.num_experts,
            routed_scaling_factor=config.routed_scale,
            kv_lora_rank=config.kv_rank,
            q_lora_rank=None,
            qk_rope_head_dim=config.rope_dim,
            v_head_dim=config.value_dim,
            qk_nope_head_dim=config.nope_dim,
            n_group=config.num_groups,
            topk_group=config.top_groups,
            num_experts_per_tok=config.top_k,
            first_k_dense_replace=config.num_dense_layers,
            norm_topk_prob=config.normalize,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.theta,
            rope_scaling=None,
            tie_word_embeddings=False,
            attention_bias=False,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    ).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in name else (0.05 if "bias" in name else 0.25) * noise)
    return theirs


def published(theirs: torch.nn.Module) -> dict[str, Tensor]:
    """The reference's weights under the names of the checkpoint: transformers fuses the experts on loading."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1), strict=True)):
                state[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                state[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            state |= {name.replace("down_proj", f"{e}.down_proj.weight"): down for e, down in enumerate(tensor)}
        else:
            state[name] = tensor
    return state


def odd_config(**changes: object) -> MoonlightConfig:
    small = MoonlightConfig(
        vocab_size=53, dim=36, num_layers=3, num_heads=3, kv_rank=20, nope_dim=6, rope_dim=4, value_dim=10, mlp_dim=44,
        num_experts=6, top_k=3, expert_dim=14, num_shared_experts=2, theta=800000.0, max_positions=64,
    )  # fmt: skip
    return small.replace(**changes)


@pytest.mark.parametrize(
    "config",
    [odd_config(), odd_config(num_groups=3, top_groups=2, top_k=2), odd_config(num_shared_experts=1, normalize=False)],
    ids=["ungrouped", "groups", "not-normalized"],
)
def test_packed_logits_are_those_of_the_reference_one_by_one(config: MoonlightConfig) -> None:
    theirs = reference(config)
    ours = build_moonlight(config)
    ours.load_state_dict(keys(config).to_ours(published(theirs)))
    ids = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        packed = Packed(ours.embed(ids), Layout(LENGTHS))
        logits = ours.head(ours(packed).hidden.tokens).split(LENGTHS)
        want = [theirs(part[None]).logits[0] for part in ids.split(LENGTHS)]

    for item, (got, expected) in enumerate(zip(logits, want, strict=True)):
        # fp32, 3 layers: largest seen 2e-6 relative
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), f"sequence {item}"


def test_gradients_are_those_of_the_reference() -> None:
    config = odd_config()
    theirs = reference(config)
    ours = build_moonlight(config)
    ours.load_state_dict(keys(config).to_ours(published(theirs)))
    ids = torch.randint(config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))

    ours.head(ours(Packed(ours.embed(ids), Layout(LENGTHS))).hidden.tokens).square().sum().backward()
    sum(theirs(part[None]).logits.square().sum() for part in ids.split(LENGTHS)).backward()

    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in theirs.named_parameters():
        p.data = grads[name]
    want = keys(config).to_ours(published(theirs))
    for name, p in ours.named_parameters():
        # fp32: largest seen 3e-6 relative
        assert (p.grad - want[name]).abs().max() <= 2e-5 * want[name].abs().max(), name


def test_key_map_survives_both_directions() -> None:
    config = odd_config()
    state = published(reference(config))
    layer = "model.layers.2.self_attn.rotary_emb.inv_freq"

    again = keys(config).to_theirs(keys(config).to_ours(state | {layer: torch.zeros(2)}))

    assert set(again) == set(state)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_router_with_groups_is_the_reference_in_a_large_table() -> None:
    """Many tokens, so that every rule of the choice matters: bias, groups, mask and weights."""
    config = odd_config(num_experts=16, num_groups=4, top_groups=2, top_k=5)
    theirs = reference(config).model.layers[1].mlp.gate
    ours = Router(
        config.dim, 16, top_k=5, scoring="sigmoid", selection_bias=True, num_groups=4, top_groups=2, scale=2.446
    )
    ours.load_state_dict({"weight": theirs.weight.data, "bias": theirs.e_score_correction_bias})
    x = torch.randn(500, config.dim, generator=torch.Generator().manual_seed(2))

    routing = ours(x)
    _, weights, experts = theirs(x)

    assert torch.equal(routing.experts.sort().values, experts.sort().values)
    by_expert = torch.zeros(500, 16).scatter(1, experts, weights)
    assert torch.allclose(torch.zeros(500, 16).scatter(1, routing.experts, routing.weights), by_expert, atol=1e-6)


GOLDEN = MoonlightConfig(
    vocab_size=20, dim=12, num_layers=2, num_heads=2, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=4, mlp_dim=20,
    num_experts=4, top_k=2, expert_dim=8, num_shared_experts=1, theta=800000.0, max_positions=131072,
)  # fmt: skip


def golden_weights() -> dict[str, Tensor]:
    """The language part of a tiny Kimi-VL: tensor n of all holds 0.3 sin(1.7 k + n), norms 1 more."""
    names = ["model.embed_tokens.weight"]
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        attn = ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        names += [prefix + "input_layernorm.weight", *(f"{prefix}self_attn.{part}.weight" for part in attn)]
        names += [prefix + "post_attention_layernorm.weight"]
        groups = ["mlp."] if layer == 0 else [*(f"mlp.experts.{e}." for e in range(4)), "mlp.shared_experts."]
        if layer == 1:
            names += [prefix + "mlp.gate.weight", prefix + "mlp.gate.e_score_correction_bias"]
        names += [f"{prefix}{group}{part}_proj.weight" for group in groups for part in ("gate", "up", "down")]
    names += ["model.norm.weight", "lm_head.weight"]
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in keys(GOLDEN).to_theirs(build_moonlight(GOLDEN).state_dict()).items()}
    assert set(names) == set(shapes)
    state = {}
    for n, name in enumerate(names, start=72 - len(names)):
        k = torch.arange(shapes[name].numel(), dtype=torch.float64)
        state[name] = (0.3 * torch.sin(1.7 * k + n) + ("norm" in name)).view(shapes[name])
    return state


def golden_model() -> Decoder:
    model = build_moonlight(GOLDEN).double()
    model.load_state_dict(keys(GOLDEN).to_ours(golden_weights()))
    return model


CHOSEN = ["12", "23", "23", "01", "12", "01", "23", "02", "02", "12", "01", "23", "01", "01", "02", "23", "12", "23"]
GOLDEN_IDS = torch.tensor([1, 7, 3, 19, 19, 4, 5, 19, 19, 19, 19, 6, 19, 19, 19, 2, 9, 8])


def golden_image_tokens() -> Tensor:
    """What the vision part of the same tiny model gives for three images, [9, 12]."""
    from vlkit.projectors import pixel_shuffle
    from vlkit.vision import moonvit

    tower = moonvit.MoonViT(
        moonvit.MoonViTConfig(dim=16, num_layers=2, num_heads=2, mlp_dim=24, position_grid=(4, 4))
    ).double()
    projector = pixel_shuffle.PixelShuffleProjector(pixel_shuffle.PixelShuffleConfig(in_dim=16, out_dim=12)).double()
    order = ["patch_embed.proj.weight", "patch_embed.proj.bias", "patch_embed.pos_emb.weight"]
    for block in range(2):
        kinds = ("norm0", "norm1", "wqkv", "wo", "mlp.fc0", "mlp.fc1")
        order += [f"encoder.blocks.{block}.{part}.{kind}" for part in kinds for kind in ("weight", "bias")]
    order += ["encoder.final_layernorm.weight", "encoder.final_layernorm.bias"]
    n = fill(tower, moonvit.KEYS, order, 0)
    order = [f"{part}.{kind}" for part in ("pre_norm", "linear_1", "linear_2") for kind in ("weight", "bias")]
    assert fill(projector, pixel_shuffle.KEYS, order, n) == 72 - len(golden_weights())
    grids = [(2, 4), (4, 4), (6, 2)]
    patches = torch.sin(0.31 * torch.arange(36 * 588, dtype=torch.float64)).view(36, 588)
    return projector(tower(Packed(patches, Layout.from_grids(grids)))).tokens


def fill(module: torch.nn.Module, names: KeyMap, order: list[str], first: int) -> int:
    state = names.to_theirs(module.state_dict())
    assert set(state) == set(order)
    for n, name in enumerate(order, start=first):
        k = torch.arange(state[name].numel(), dtype=torch.float64)
        norm = "norm" in name and name.endswith("weight")
        state[name] = (0.3 * torch.sin(1.7 * k + n) + norm).view(state[name].shape)
    module.load_state_dict(names.to_ours(state))
    return first + len(order)


def test_golden_numbers_of_the_language_part() -> None:
    """Numbers that a second, independent program reproduced to 1e-7. The tower's rotary frequencies are fp32, the rest fp64."""
    model = golden_model()
    with torch.no_grad():
        x = model.embed(GOLDEN_IDS)
        x[GOLDEN_IDS == 19] = golden_image_tokens()
        out = model(Packed(x, Layout((18,))))
        logits = model.head(out.hidden.tokens)

    chosen = ["".join(map(str, row)) for row in out.routing[0].experts.sort().values.tolist()]
    assert chosen == CHOSEN
    assert logits.argmax(-1).tolist() == [2, 12, 0, 1, 1, 18, 2, 1, 1, 1, 1, 16, 1, 1, 1, 16, 2, 18]
    last = torch.tensor([-0.296875, 0.377401, 0.312236, -0.364692, -0.327080, 0.351379, 0.341381, -0.337485])
    assert torch.allclose(logits[17, :8].float(), last, atol=2e-6, rtol=0)  # six decimals are given
    assert abs(logits.sum() - 3.356483) < 2e-5
    assert abs(logits.abs().sum() - 251.001253) < 2e-5
