"""Vision towers on images of mixed resolution: each against other libraries' tower with the same weights, and against padding.

    python benchmarks/vision.py [TOWER ...] [--layers 2] [--repeats 5] [--threads 1] [--dtypes float32 bfloat16]
                                [--backward] [--compile]

    moonvit         transformers' tower of kimi_k25
    moonvit-small   the same at width 96 on 64 small images, as in the demo
    qwen2-vit       transformers' tower of Qwen2-VL, each with its merger
    qwen2.5-vit     transformers' tower of Qwen2.5-VL, each with its merger
    qwen3-vit       transformers' tower of Qwen3-VL, each with its mergers
    siglip2         timm's NaFlexViT and transformers' Siglip2, which pad and mask; without rotary embedding, as they are

The published widths with fewer layers, so that a run stays short; time per layer is what counts, and the work before and
after the blocks is the same as with all. All inputs are random images; all weights are random. Where other processes want
the same cores, only the ratios by CPU time are steady. Beside the peers are timed:
    padded         vlkit's tower on the same images, each padded to the largest grid, one item each
    kernels alone  the tower's matrix products and attention kernels on ready operands, and nothing else
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import compare, machine, matmul_only, print_table

from vlkit.layers.self_attention import SelfAttention
from vlkit.packing import Layout, Packed
from vlkit.projectors import patch_merger
from vlkit.projectors.patch_merger import PatchMerger, PatchMergerConfig
from vlkit.vision import (
    MoonViT,
    MoonViTConfig,
    Qwen2ViT,
    Qwen2ViTConfig,
    Qwen3ViT,
    Qwen3ViTConfig,
    Qwen25ViT,
    Qwen25ViTConfig,
    SigLIP2,
    SigLIP2Config,
    moonvit,
    qwen2_5_vit,
    qwen2_vit,
    qwen3_vit,
    siglip2,
)

# Rows and columns of patches: tall and wide images and a few small ones, as they meet in one batch.
MIXED = [(18, 24), (24, 10), (14, 14), (8, 20), (6, 8), (12, 16)]
SMALL = [(r, c) for r in (2, 3, 4, 6) for c in (2, 3, 4, 5)] * 4

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """Another library's module with the weights of ours.

    Attributes:
        module: The module.
        prepare: patches -> its forward on them; inputs are arranged as it wants them, outside the timing.
        rows: (what the forward gave, the layout of the patches) -> rows as ours gives them.
    """

    module: nn.Module
    prepare: Callable[[nn.Module, Packed], Run]
    rows: Callable[[Tensor, Layout], Tensor] = lambda out, layout: out


@dataclass(frozen=True)
class Subject:
    """A tower of ours, perhaps with its projector behind it, and its peers by name."""

    tower: Any
    ours: nn.Module
    peers: dict[str, Peer]
    grids: list[tuple[int, int]]


# ---- MoonViT


def moonvit_subject(config: MoonViTConfig, grids: list[tuple[int, int]], merge_size: int) -> Subject:
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionConfig, Kimi_K25VisionModel

    tower = MoonViT(config)
    theirs = Kimi_K25VisionModel(
        Kimi_K25VisionConfig(
            patch_size=config.patch_size,
            pos_emb_height=config.position_grid[0],
            pos_emb_width=config.position_grid[1],
            num_attention_heads=config.num_heads,
            num_hidden_layers=config.num_layers,
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            merge_kernel_size=(merge_size, merge_size),
            rope_parameters={"rope_type": "axial", "rope_theta": config.theta},
            attn_implementation="sdpa",
        )
    )
    state = {}
    for name, tensor in moonvit.KEYS.to_theirs(tower.state_dict()).items():
        name = name.replace("pos_emb.weight", "pos_emb.position_embeddings").replace("encoder.blocks.", "layers.")
        name = name.replace("encoder.", "").replace("norm1.", "norm2.").replace("norm0.", "norm1.")
        name = name.replace("fc1.", "fc2.").replace("fc0.", "fc1.").replace("wo.", "attn.proj.")
        if "wqkv." not in name:
            state[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            if part != "v":  # rotate-half wants the even channels of a head before the odd ones
                rows = rows.unflatten(0, (config.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            state[name.replace("wqkv.", f"attn.{part}_proj.")] = rows
    theirs.load_state_dict(state)

    def prepare(theirs: nn.Module, patches: Packed) -> Run:
        pixels = patches.tokens.view(-1, config.in_channels, config.patch_size, config.patch_size)
        grid_thw = torch.tensor(patches.layout.grids)
        return lambda: theirs(pixels, grid_thw=grid_thw).last_hidden_state.view(-1, config.dim)

    return Subject(tower, tower, {"kimi_k25": Peer(theirs, prepare)}, grids)


def moonvit_full(layers: int) -> Subject:
    return moonvit_subject(MoonViTConfig(num_layers=layers), MIXED, merge_size=2)


def moonvit_small(layers: int) -> Subject:
    config = MoonViTConfig(dim=96, num_layers=layers, num_heads=4, mlp_dim=256, position_grid=(16, 16))
    return moonvit_subject(config, SMALL, merge_size=1)


# ---- Qwen


def qwen_subject(tower: Any, name: str, keys: Any, theirs: Any, *, norm: str, merger_keys: Any) -> Subject:
    """A Qwen tower and its merger, as transformers has them in one module."""
    levels = getattr(tower.config, "num_levels", 1)
    merger = PatchMerger(
        PatchMergerConfig(in_dim=tower.config.out_dim, norm=norm, num_levels=levels)  # type: ignore[arg-type]
    )
    published = keys.to_theirs(tower.state_dict()) | merger_keys.to_theirs(merger.state_dict())
    theirs.load_state_dict(published)

    def prepare(theirs: nn.Module, patches: Packed) -> Run:
        items = [
            rearrange(item, "(t h a w b) d -> (t h w a b) d", t=t, h=h // 2, w=w // 2, a=2, b=2)
            for item, (t, h, w) in zip(patches.unpack(), patches.layout.grids or (), strict=True)
        ]
        pixels, grid_thw = torch.cat(items), torch.tensor(patches.layout.grids)

        def run() -> Tensor:
            out = theirs(pixels, grid_thw=grid_thw)
            return torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], dim=-1)

        return run

    return Subject(tower, nn.Sequential(tower, merger), {name: Peer(theirs, prepare)}, MIXED)


def shared_sizes(config: Any) -> dict[str, Any]:
    """What transformers calls the sizes that all three towers have."""
    return {
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "patch_size": config.patch_size,
        "attn_implementation": "sdpa",
    }


def qwen2(layers: int) -> Subject:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import (
        Qwen2VisionTransformerPretrainedModel,
        Qwen2VLVisionConfig,
    )

    config = Qwen2ViTConfig(num_layers=layers)
    made = Qwen2VLVisionConfig(
        **shared_sizes(config), embed_dim=config.dim, hidden_size=3584, mlp_ratio=config.mlp_dim // config.dim
    )
    theirs, keys = Qwen2VisionTransformerPretrainedModel(made), qwen2_vit.keys(config)
    return qwen_subject(Qwen2ViT(config), "Qwen2-VL", keys, theirs, norm="layer", merger_keys=patch_merger.KEYS)


def qwen25(layers: int) -> Subject:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionConfig,
    )

    config = Qwen25ViTConfig(num_layers=layers, full_layers=(layers - 1,))
    made = Qwen2_5_VLVisionConfig(
        **shared_sizes(config),
        hidden_size=config.dim,
        intermediate_size=config.mlp_dim,
        out_hidden_size=3584,
        window_size=config.window_size,
        fullatt_block_indexes=list(config.full_layers),
    )
    theirs, keys = Qwen2_5_VisionTransformerPretrainedModel(made), qwen2_5_vit.keys(config)
    return qwen_subject(Qwen25ViT(config), "Qwen2.5-VL", keys, theirs, norm="rms", merger_keys=patch_merger.KEYS)


def qwen3(layers: int) -> Subject:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel

    config = Qwen3ViTConfig(num_layers=layers, taps=(0,))
    made = Qwen3VLVisionConfig(
        **shared_sizes(config),
        hidden_size=config.dim,
        intermediate_size=config.mlp_dim,
        out_hidden_size=3584,
        num_position_embeddings=config.position_grid[0] * config.position_grid[1],
        deepstack_visual_indexes=list(config.taps),
    )
    theirs, keys = Qwen3VLVisionModel(made), qwen3_vit.keys(config)
    return qwen_subject(Qwen3ViT(config), "Qwen3-VL", keys, theirs, norm="layer", merger_keys=patch_merger.QWEN3_KEYS)


# ---- SigLIP2


def siglip2_subject(layers: int) -> Subject:
    """Peers resample tables by rules of their own, so the table is one vector in every cell: the same by all rules."""
    config = SigLIP2Config(
        dim=1152, num_layers=layers, num_heads=16, mlp_dim=4304, position_grid=(16, 16), use_rope=False
    )
    tower = SigLIP2(config)
    with torch.no_grad():
        assert tower.positions is not None
        tower.positions.table.copy_(torch.randn(config.dim).expand_as(tower.positions.table))
    return Subject(
        tower, tower, {"timm NaFlexViT": _naflexvit(tower), "transformers Siglip2": _transformers(tower)}, MIXED
    )


def _side_by_side(patches: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Patches [images, longest, patch_dim], their (row, column), and which are no padding."""
    grids, longest = patches.layout.grids or (), patches.layout.max_length
    wide = patches.tokens.new_zeros(len(grids), longest, patches.tokens.shape[1])
    places = torch.zeros(len(grids), longest, 2, dtype=torch.int64)
    real = torch.zeros(len(grids), longest, dtype=torch.bool)
    for image, (tokens, (_, h, w)) in enumerate(zip(patches.unpack(), grids, strict=True)):
        wide[image, : h * w], real[image, : h * w] = tokens, True
        places[image, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return wide, places, real


def _without_padding(out: Tensor, layout: Layout) -> Tensor:
    return torch.cat([image[:length] for image, length in zip(out, layout.lengths, strict=True)])


def _naflexvit(tower: SigLIP2) -> Peer:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    config = tower.config
    theirs = NaFlexVit(
        NaFlexVitCfg(
            patch_size=config.patch_size,
            embed_dim=config.dim,
            depth=config.num_layers,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.dim,
            act_layer="gelu_tanh",
            global_pool="",
            pos_embed_interp_mode="bilinear",
            patchify_channels_last=False,
        ),
        num_classes=0,
    )
    names = {
        "patch_embed.": "embeds.",
        "positions.table": "embeds.pos_embed",
        "attn.out.": "attn.proj.",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in tower.state_dict().items():
        for mine, other in names.items():
            name = name.replace(mine, other)
        part = next((p for p in "qkv" if f"attn.{p}." in name), None)
        if part is None:
            state[name] = tensor[None] if name == "embeds.pos_embed" else tensor
        else:
            fused = name.replace(f"attn.{part}.", "attn.qkv.")
            state[fused] = torch.cat([state[fused], tensor]) if fused in state else tensor
    theirs.load_state_dict(state)

    def prepare(theirs: Any, patches: Packed) -> Run:
        wide, places, real = _side_by_side(patches)
        return lambda: theirs.forward_features(wide, patch_coord=places, patch_valid=real)["patches"]

    return Peer(theirs, prepare, _without_padding)


def _transformers(tower: SigLIP2) -> Peer:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = tower.config
    theirs = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=config.dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            patch_size=config.patch_size,
            num_patches=config.position_grid[0] * config.position_grid[1],
            vision_use_head=False,
            attn_implementation="sdpa",
        )
    )
    theirs.load_state_dict(siglip2.keys("patch_embedding", "position_embedding").to_theirs(tower.state_dict()))

    def prepare(theirs: nn.Module, patches: Packed) -> Run:
        wide, _, real = _side_by_side(patches)
        shapes = torch.tensor([(h, w) for _, h, w in patches.layout.grids or ()])
        return lambda: theirs(wide, pixel_attention_mask=real, spatial_shapes=shapes).last_hidden_state

    return Peer(theirs, prepare, _without_padding)


SUBJECTS: dict[str, Callable[[int], Subject]] = {
    "moonvit": moonvit_full,
    "moonvit-small": moonvit_small,
    "qwen2-vit": qwen2,
    "qwen2.5-vit": qwen25,
    "qwen3-vit": qwen3,
    "siglip2": siglip2_subject,
}


# ---- what is timed


def padded(patches: Packed) -> Packed:
    """Every image padded with blank patches to the largest rows and columns."""
    grids = patches.layout.grids or ()
    rows, columns = max(h for _, h, _ in grids), max(w for _, _, w in grids)
    whole = patches.tokens.new_zeros(len(grids), rows, columns, patches.tokens.shape[1])
    for image, (tokens, (_, h, w)) in enumerate(zip(patches.unpack(), grids, strict=True)):
        whole[image, :h, :w] = tokens.view(h, w, -1)
    return Packed(whole.flatten(0, 2), Layout.from_grids([(rows, columns)] * len(grids)))


def kernels_alone(ours: nn.Module, patches: Packed) -> Callable[[], None]:
    """The forward's matrix products and attention kernels, as one forward calls them, on operands that lie ready."""
    products: list[tuple[int, int, int]] = []
    attended: list[list[Tensor]] = []

    def note_linear(layer: nn.Linear, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        products.append((inputs[0].shape[0], layer.in_features, layer.out_features))

    def note_attention(layer: SelfAttention, inputs: tuple[Any, ...], out: Tensor) -> None:
        heads, channels = layer.num_heads, out.shape[1] // layer.num_heads
        lengths = inputs[2].offsets.diff().tolist()
        runs = {length: lengths.count(length) for length in lengths}
        attended.append([torch.randn(n, heads, length, channels, dtype=out.dtype) for length, n in runs.items()])

    notes: list[Any] = []
    for module in ours.modules():
        if isinstance(module, nn.Linear):
            notes.append(module.register_forward_hook(note_linear))
        elif isinstance(module, SelfAttention):
            notes.append(module.register_forward_hook(note_attention))
    ours(patches)
    for note in notes:
        note.remove()
    multiply = matmul_only(products, patches.tokens.dtype)

    @torch.no_grad()
    def run() -> None:
        multiply()
        for layer in attended:
            for x in layer:
                F.scaled_dot_product_attention(x, x, x)

    return run


def measure(name: str, subject: Subject, dtype: torch.dtype, options: argparse.Namespace) -> None:
    tower, ours = subject.tower, subject.ours.to(dtype).eval()
    layout = Layout.from_grids(subject.grids)
    patches = Packed(torch.randn(layout.num_tokens, tower.config.patch_dim).to(dtype), layout)
    wide = padded(patches)
    runs: dict[str, Run] = {"vlkit": lambda: ours(patches).tokens}
    for peer_name, peer in subject.peers.items():
        runs[peer_name] = peer.prepare(peer.module.to(dtype).eval(), patches)
    what = f"{name}, {str(dtype).removeprefix('torch.')}"
    with torch.no_grad():
        mine = runs["vlkit"]()
        for peer_name, peer in subject.peers.items():
            error = (mine - peer.rows(runs[peer_name](), layout)).abs().max() / mine.abs().max()
            print(f"\n{what}: largest relative difference to {peer_name} {float(error):.1e}")
        forward: dict[str, Callable[[], object]] = {**runs, "padded": lambda: ours(wide)}
        forward["kernels alone"] = kernels_alone(ours, patches)
        timings = compare(forward, repeats=options.repeats, warmup=1)
    first = next(iter(subject.peers))
    print_table(f"{what}: forward", timings, baseline=first)
    print(f"  {layout.num_items / timings.median('vlkit'):.2f} images/s")
    for other in (*subject.peers, "padded", "kernels alone"):
        by_wall, by_cpu = timings.speedup("vlkit", over=other), timings.cpu_speedup("vlkit", over=other)
        print(f"  against {other}: {by_wall:.2f}, by CPU time {by_cpu:.2f}")
    if options.backward:
        modules = [ours, *(peer.module for peer in subject.peers.values())]

        def backward(run: Run) -> None:
            run().float().square().mean().backward()

        def clear() -> None:
            for module in modules:
                module.zero_grad(set_to_none=True)

        both = {key: partial(backward, run) for key, run in runs.items()}
        timings = compare(both, repeats=options.repeats, warmup=1, setup=clear)
        print_table(f"{what}: forward and backward", timings, baseline=first)
        clear()
    if options.compile:
        compiled(what, subject, patches, options.repeats)


@torch.no_grad()
def compiled(what: str, subject: Subject, patches: Packed, repeats: int) -> None:
    """All under torch.compile. Peers as a whole, because that is what their users can compile; ours by its block stack."""
    eager = subject.tower.forward_blocks
    subject.tower.forward_blocks = torch.compile(eager, fullgraph=True, dynamic=True)
    runs: dict[str, Callable[[], object]] = {"vlkit": lambda: subject.ours(patches)}
    for name, peer in subject.peers.items():
        runs[name] = peer.prepare(torch.compile(peer.module, dynamic=True), patches)  # type: ignore[arg-type]
    try:
        timings = compare(runs, repeats=repeats)
        print_table(f"{what}: forward, compiled", timings, baseline=next(iter(subject.peers)))
    finally:
        subject.tower.forward_blocks = eager


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("towers", nargs="*", default=[], metavar="TOWER", help=", ".join(SUBJECTS))
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    arguments.add_argument("--backward", action="store_true")
    arguments.add_argument("--compile", action="store_true")
    options = arguments.parse_args()
    if unknown := set(options.towers) - set(SUBJECTS):
        arguments.error(f"no tower is called {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    torch.set_num_threads(options.threads)
    print(machine())
    for name in options.towers or SUBJECTS:
        torch.manual_seed(0)
        subject = SUBJECTS[name](options.layers)
        layout = Layout.from_grids(subject.grids)
        print(
            f"\n{name}: {layout.num_items} images, {layout.num_tokens} patches, {subject.tower.config.num_layers} layers "
            f"of width {subject.tower.config.dim}"
        )
        for dtype in options.dtypes:
            measure(name, subject, getattr(torch, dtype), options)


if __name__ == "__main__":
    main()
