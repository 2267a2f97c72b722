"""Decoding, one token after another, against transformers' generate with the same weights.

    python benchmarks/decode.py [--threads 1] [--repeats 5] [--only small | large | experts | latent]

Both sides answer the same prompt greedily; transformers with its growing and with its static cache. "stream" is what no
decoder on this machine can beat by much: one product with every weight that a token uses. The last table decodes behind
8,192 tokens of context.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from harness import compare, machine, print_table
from torch import Tensor, nn

from vlkit.generation import generate
from vlkit.layers.moe import Experts
from vlkit.llm import moonlight, qwen3
from vlkit.llm.decoder import Decoder
from vlkit.llm.moonlight import MoonlightConfig, build_moonlight
from vlkit.llm.qwen3 import Qwen3Config, build_qwen3
from vlkit.packing import Batch, Layout, Packed


class TextModel:
    """A decoder alone, as the decode loop wants a model."""

    def __init__(self, llm: Decoder) -> None:
        self.llm = llm

    def decode(self, batch: Batch, *, cache: Any = None) -> Any:
        return self.llm(batch.ids.with_tokens(self.llm.embed(batch.ids.tokens)), cache=cache)


def hub_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as checkpoints have them, from the fused ones that transformers keeps."""
    made = {}
    for name, tensor in state.items():
        stem, part = name.rsplit(".", 1)
        if part == "gate_up_proj":
            for expert, pair in enumerate(tensor):
                gate, up = pair.chunk(2)
                made |= {f"{stem}.{expert}.gate_proj.weight": gate, f"{stem}.{expert}.up_proj.weight": up}
        elif stem.endswith("experts"):
            made |= {f"{stem}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            made[name] = tensor
    return made


def pair(config: Qwen3Config) -> tuple[Decoder, nn.Module]:
    """Ours and theirs with the same random weights."""
    sizes = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
        "eos_token_id": None,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if config.num_experts:
        theirs = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                **sizes,
                moe_intermediate_size=config.expert_dim,
                num_experts=config.num_experts,
                num_experts_per_tok=config.top_k,
                norm_topk_prob=config.normalize,
            )
        )
    else:
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    state = {
        name: t for name, t in hub_experts(theirs.state_dict()).items() if not config.tied or name != "lm_head.weight"
    }
    ours = build_qwen3(config)
    ours.load_state_dict(qwen3.keys(config).to_ours(state))
    return ours.eval(), theirs.eval()


def stream(model: Decoder) -> Callable[[], None]:
    """One product with every matrix that a token uses; of every layer's experts with as many as are chosen."""
    stacks = [module for module in model.modules() if isinstance(module, Experts)]
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if model.lm_head is None:
        linears.append(model.embedding.weight)
    rows = {weight.shape[-1]: torch.randn(1, weight.shape[-1]) for weight in linears}
    top_k = getattr(model.config, "top_k", 0)

    @torch.no_grad()
    def run() -> None:
        for weight in linears:
            F.linear(rows[weight.shape[-1]], weight)
        for experts in stacks:
            for expert in torch.randperm(len(experts.gate))[:top_k].tolist():
                for stack in (experts.gate, experts.up, experts.down):
                    torch.mv(stack[expert], torch.ones(stack.shape[-1]))

    return run


def against_generate(title: str, config: Qwen3Config, repeats: int, new: int) -> None:
    """Seconds of whole answers. The prompt is one token, so that all of it is decoding."""
    torch.manual_seed(0)
    ours, theirs = pair(config)
    ids = torch.randint(config.vocab_size, (1,))
    batch = Batch(Packed(ids, Layout((1,))))

    def vlkit() -> list[int]:
        return generate(TextModel(ours), batch, max_new_tokens=new)[0]

    def reference(cache: str | None) -> Callable[[], list[int]]:
        def run() -> list[int]:
            out = theirs.generate(
                ids[None],
                attention_mask=torch.ones(1, 1, dtype=torch.long),
                max_new_tokens=new,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
            )
            return out[0, 1:].tolist()

        return run

    runs = {"vlkit": vlkit, "transformers": reference(None), "static cache": reference("static")}
    answers = {name: run() for name, run in runs.items()}
    assert answers["vlkit"] == answers["transformers"] == answers["static cache"], "the answers differ"
    floor = stream(ours)
    runs["stream"] = lambda: [floor() for _ in range(new)]
    timings = compare(runs, repeats=repeats, warmup=0)  # the answers above were the warm-up
    size = sum(p.numel() for p in ours.parameters()) / 1e6
    print_table(f"{title}, {size:.0f} M parameters, fp32, {new} tokens", timings, baseline="transformers")
    print(
        f"  vlkit takes {timings.cpu_speedup('stream', over='vlkit'):.2f} x the time of streaming the weights, by cpu"
    )


def behind_context(context: int, repeats: int) -> None:
    """One layer of latent attention at Moonlight's sizes: a step behind so many tokens."""
    torch.manual_seed(0)
    config = MoonlightConfig(vocab_size=64, num_layers=1, mlp_dim=64, max_positions=2 * context, tied=False)
    theirs = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=64,
            hidden_size=config.dim,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            q_lora_rank=None,
            kv_lora_rank=config.kv_rank,
            qk_nope_head_dim=config.nope_dim,
            qk_rope_head_dim=config.rope_dim,
            v_head_dim=config.value_dim,
            first_k_dense_replace=1,
            max_position_embeddings=2 * context,
            rope_theta=config.theta,
            rope_scaling=None,
            rms_norm_eps=config.norm_eps,
        )
    ).eval()
    ours = build_moonlight(config).eval()
    ours.load_state_dict(moonlight.keys(config).to_ours(theirs.state_dict()))
    stored = torch.randn(context, config.kv_rank + config.rope_dim)  # as if such tokens had been seen
    latent, rotated = stored.split([config.kv_rank, config.rope_dim], dim=-1)
    rotated = torch.cat([rotated[:, ::2], rotated[:, 1::2]], dim=-1)  # transformers keeps the halves of pairs apart
    room = context + 2 * repeats + 8  # every call adds a token, on both sides
    cache = ours.new_cache(1, room, dtype=torch.float32)
    cache.write(0, Layout((context,)), stored)
    cache.advance(Layout((context,)))
    pasts = {
        "transformers": transformers.DynamicCache(config=theirs.config),
        "static cache": transformers.StaticCache(config=theirs.config, max_cache_len=room),
    }

    @torch.no_grad()
    def step() -> Tensor:
        return ours.head(ours(Packed(ours.embed(torch.tensor([5])), Layout((1,))), cache=cache).hidden.tokens)

    def reference(past: Any) -> Callable[[], Tensor]:
        past.update(latent[None, None], rotated[None, None], 0)

        @torch.no_grad()
        def run() -> Tensor:
            return theirs(input_ids=torch.tensor([[5]]), past_key_values=past, use_cache=True).logits

        return run

    runs = {"vlkit": step} | {name: reference(past) for name, past in pasts.items()}
    first, *others = (run().flatten() for run in runs.values())
    for other in others:
        assert torch.allclose(first, other, rtol=0, atol=1e-4 * float(other.abs().max())), "the logits differ"
    timings = compare(runs, repeats=repeats)
    print_table(f"latent attention, one layer, {context} tokens of context", timings, baseline="transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("small", "large", "experts", "latent"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    small = Qwen3Config(
        vocab_size=16000, dim=512, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=1536
    )
    settings = {  # title, sizes, new tokens per answer
        "small": ("12 layers of 512", small, 32),
        "large": (
            "24 layers of 1024",
            small.replace(dim=1024, num_layers=24, num_heads=16, num_kv_heads=8, mlp_dim=3072),
            12,
        ),
        "experts": (
            "12 layers of 512, 32 experts of 512, top-4",
            small.replace(num_experts=32, top_k=4, expert_dim=512, tied=False),
            32,
        ),
    }
    for name, (title, config, new) in settings.items():
        if options.only in (None, name):
            against_generate(title, config, options.repeats, new)
    if options.only in (None, "latent"):
        behind_context(8192, 2 * options.repeats)


if __name__ == "__main__":
    main()
