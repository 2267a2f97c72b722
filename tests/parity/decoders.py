"""What parity tests of decoders share: sizes under transformers' names, random weights, and the comparison itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlkit.hub.keymap import KeyMap


def hub_sizes(config: Any) -> dict[str, Any]:
    """The sizes that all decoders have, as transformers calls them."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "attn_implementation": "eager",
    }


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that no mistake hides behind small numbers."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor per expert, as checkpoints have them: transformers fuses the experts on loading."""
    made = {}
    for name, tensor in state.items():
        stem = name.rsplit(".", 1)[0]
        if name.endswith("gate_up_proj"):
            for expert, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1), strict=True)):
                made |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            made |= {f"{stem}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            made[name] = tensor
    return made


def assert_same_gradients(
    ours: nn.Module,
    loss: Tensor,
    theirs: nn.Module,
    their_loss: Tensor,
    keys: KeyMap,
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = published,
) -> None:
    """Every gradient to 2e-5 of its largest entry; both losses are run backward."""
    loss.backward()
    their_loss.backward()
    grads = keys.to_ours(names({name: p.grad for name, p in theirs.named_parameters()}))
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - grads[name]).abs().max() <= 2e-5 * grads[name].abs().max(), name
