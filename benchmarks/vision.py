"""MoonViT on images of mixed resolution: against transformers' tower with the same weights, and against padding.

    python benchmarks/vision.py [--layers 4] [--repeats 7] [--threads 2] [--no-compile] [--small]

The published width (1152, 16 heads, MLP 4304) with fewer layers, so that a run stays short; time per layer is what
counts, and the work before and after the blocks is the same as with 27. All inputs are random images; all weights are
random.

Where other processes want the same cores, only the ratios by CPU time are steady. Printed for fp32 and bf16, forward
and forward with backward:
    vlkit          the tower
    kimi_k25       transformers' tower, SDPA attention, same weights through the published names
    padded         vlkit's tower on the same images, each padded to the largest grid, one item each
    kernels alone  the tower's matrix products and attention kernels on ready operands, and nothing else
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import compare, machine, matmul_only, print_table

from vlkit.packing import Layout, Packed
from vlkit.vision.moonvit import KEYS, MoonViT, MoonViTConfig

# Rows and columns of patches: tall and wide images and a few small ones, as they meet in one batch.
MIXED = [(18, 24), (24, 10), (14, 14), (8, 20), (6, 8), (12, 16)]
SMALL = [(r, c) for r in (2, 3, 4, 6) for c in (2, 3, 4, 5)] * 4


def kimi_k25(tower: MoonViT, merge_size: int = 2) -> nn.Module:
    """transformers' tower with the weights of ours."""
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionConfig, Kimi_K25VisionModel

    config = tower.config
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
    for name, tensor in KEYS.to_theirs(tower.state_dict()).items():
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
    return theirs.eval()


def padded(patches: Packed) -> Packed:
    """Every image padded with blank patches to the largest rows and columns."""
    grids = patches.layout.grids or ()
    rows, columns = max(h for _, h, _ in grids), max(w for _, _, w in grids)
    whole = patches.tokens.new_zeros(len(grids), rows, columns, patches.tokens.shape[1])
    for image, (tokens, (_, h, w)) in enumerate(zip(patches.unpack(), grids, strict=True)):
        whole[image, :h, :w] = tokens.view(h, w, -1)
    return Packed(whole.flatten(0, 2), Layout.from_grids([(rows, columns)] * len(grids)))


def kernels_alone(config: MoonViTConfig, layout: Layout, dtype: torch.dtype) -> Callable[[], None]:
    """The forward's matrix products and attention kernels on operands that lie ready."""
    tokens, dim, mlp_dim = layout.num_tokens, config.dim, config.mlp_dim
    layer = [(tokens, dim, dim)] * 4 + [(tokens, dim, mlp_dim), (tokens, mlp_dim, dim)]
    products = matmul_only([(tokens, config.patch_dim, dim), *layer * config.num_layers], dtype)
    heads = [torch.randn(1, config.num_heads, length, config.head_dim).to(dtype) for length in layout.lengths]

    @torch.no_grad()
    def run() -> None:
        products()
        for _ in range(config.num_layers):
            for x in heads:
                F.scaled_dot_product_attention(x, x, x)

    return run


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--no-compile", action="store_true")
    arguments.add_argument(
        "--small", action="store_true", help="64 small images and a tower of width 96, as in the demo"
    )
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    grids = SMALL if options.small else MIXED
    config = MoonViTConfig(num_layers=options.layers)
    if options.small:
        config = MoonViTConfig(dim=96, num_layers=options.layers, num_heads=4, mlp_dim=256, position_grid=(16, 16))
    tower = MoonViT(config).eval()
    theirs = kimi_k25(tower, merge_size=1 if options.small else 2)
    layout = Layout.from_grids(grids)
    print(machine())
    print(
        f"{layout.num_items} images, {layout.num_tokens} patches, lengths {layout.lengths[:8]}; "
        f"{config.num_layers} layers of width {config.dim}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        tower, theirs = tower.to(dtype), theirs.to(dtype)
        patches = Packed(torch.randn(layout.num_tokens, config.patch_dim).to(dtype), layout)
        pixels = patches.tokens.view(-1, config.in_channels, config.patch_size, config.patch_size)
        grid_thw = torch.tensor(layout.grids)
        wide = padded(patches)

        def ours(x: Packed = patches, tower: MoonViT = tower) -> Tensor:
            return tower(x).tokens

        def peer(pixels: Tensor = pixels, theirs: nn.Module = theirs, grid_thw: Tensor = grid_thw) -> Tensor:
            return theirs(pixels, grid_thw=grid_thw).last_hidden_state

        with torch.no_grad():
            error = float((ours() - peer().view(-1, config.dim)).abs().max() / ours().abs().max())
            print(f"\n{dtype}: largest relative difference to kimi_k25 {error:.1e}")
            forward = {"vlkit": ours, "kimi_k25": peer, "padded": lambda x=wide, ours=ours: ours(x)}
            forward["kernels alone"] = kernels_alone(config, layout, dtype)
            timings = compare(forward, repeats=options.repeats)
        print_table(f"{dtype} forward", timings, baseline="kimi_k25")
        by_wall, by_cpu = (f("vlkit", over="kernels alone") for f in (timings.speedup, timings.cpu_speedup))
        print(f"  tower over its kernels alone: {1 / by_wall:.3f}, by CPU time {1 / by_cpu:.3f}")
        by_wall, by_cpu = (f("vlkit", over="padded") for f in (timings.speedup, timings.cpu_speedup))
        print(f"  against padding every image: {by_wall:.2f}x faster, by CPU time {by_cpu:.2f}x")

        def backward(run: Callable[[], Tensor]) -> Callable[[], None]:
            return lambda: run().float().square().mean().backward()

        def clear(tower: MoonViT = tower, theirs: nn.Module = theirs) -> None:
            tower.zero_grad(set_to_none=True)
            theirs.zero_grad(set_to_none=True)

        both = {"vlkit": backward(ours), "kimi_k25": backward(peer)}
        print_table(
            f"{dtype} forward and backward",
            compare(both, repeats=options.repeats, setup=clear),
            baseline="kimi_k25",
        )
        if not options.no_compile:
            compiled(tower, theirs, patches, pixels, grid_thw, dtype, options.repeats)


@torch.no_grad()
def compiled(
    tower: MoonViT,
    theirs: nn.Module,
    patches: Packed,
    pixels: Tensor,
    grid_thw: Tensor,
    dtype: torch.dtype,
    repeats: int,
) -> None:
    """Both under torch.compile. kimi_k25 as a whole, because that is what its users can compile; ours by its block
    stack."""
    eager = tower.forward_blocks
    tower.forward_blocks = torch.compile(eager, fullgraph=True, dynamic=True)  # type: ignore[method-assign]
    peer = torch.compile(theirs, dynamic=True)
    try:
        timings = compare(
            {
                "vlkit compiled": lambda: tower(patches),
                "kimi_k25 compiled": lambda: peer(pixels, grid_thw=grid_thw),
            },
            repeats=repeats,
        )
        print_table(f"{dtype} forward, compiled", timings, baseline="kimi_k25 compiled")
    finally:
        tower.forward_blocks = eager  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
