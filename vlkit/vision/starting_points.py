"""Starting points: towers filled from encoders that others published, before training goes on at native resolution.

    tower = vlkit.vision.AIMv2(AIMv2Config())
    load_starting_point(tower, "apple/aimv2-large-patch14-448")
    -> StartingPoint(layout="transformers", table="32x32, as published", dropped=("head.cls_token", ...))

Which layout a checkpoint is in is seen from its names and shapes, never from what it is called: the same repository has held
two. Pooling heads and text towers are left out and reported. Everything else must fit, name by name.

With `use_rope=False`, on the grid of the source's table, the features are the source's. Rotary embedding has no weights: a
tower with `use_rope=True` turns queries and keys that never were turned, so its features move until it is trained.
A table of another grid than the tower's is resampled once, as the towers do it in every forward.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vlkit.errors import CheckpointError, ConfigError
from vlkit.hub.checkpoint import Checkpoint, open_checkpoint
from vlkit.hub.keymap import KeyMap, drop, rename, reshape, split
from vlkit.hub.pretrained import load_weights, resolve
from vlkit.hub.safe_files import safe_file
from vlkit.hub.strict_json import read_json
from vlkit.layers.patch import conv_to_linear, linear_to_conv
from vlkit.layers.position import interpolate_positions_reference, list_to_table, table_to_list
from vlkit.packing import Layout
from vlkit.vision import aimv2, moonvit, siglip2
from vlkit.vision.aimv2 import AIMv2
from vlkit.vision.moonvit import MoonViT
from vlkit.vision.siglip2 import SigLIP2


@dataclass(frozen=True)
class StartingPoint:
    """What was found in a checkpoint, and what was made of it.

    Attributes:
        layout: Whose names the checkpoint has.
        prefix: What stands before them.
        table: What became of the position table, in words.
        dropped: Names that the tower has no use for: heads, text towers, scales.
    """

    layout: str
    prefix: str
    table: str
    dropped: tuple[str, ...]


def load_starting_point(
    tower: nn.Module,
    repo_or_folder: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> StartingPoint:
    """Fill a tower with the weights of a published encoder, streamed from its files.

    Read are AIMv2 in Apple's first layout, timm's and transformers'; SigLIP and SigLIP2, of one size or NaFlex, in timm's and
    transformers' layouts; and what each tower is called in its own family. AIMv2 takes AIMv2; SigLIP2 and MoonViT take SigLIP
    and SigLIP2, MoonViT with its epsilon of 1e-5 for their 1e-6.

    Args:
        tower: An AIMv2, SigLIP2 or MoonViT with the sizes of the encoder; its table may be of another grid. Parameters keep
            their dtype and device; those on meta are allocated on the CPU, in the dtype of the checkpoint.
        repo_or_folder: A folder, or a repository id of the Hub.
        prefix: What stands before the names of the encoder, such as "vision_model."; None finds it.
        revision: Branch, tag or commit.
        cache_dir: Where downloads are kept; None means the Hub client's own place.
        token: For gated and private repositories; None means the one that is stored.
        local_files_only: Never ask the Hub.
        allow_pickle: Read `.bin` files if there is nothing else, with torch's weights_only loader.

    Returns:
        The layout that was found, what became of the table, and what was left out.

    Raises:
        ConfigError: A tower for which no starting point is known, or a config.json that states other heads, patches, activation
            or epsilon than the tower's. The tower is unchanged.
        KeyMismatchError: Names or shapes that do not fit, all in one report. The tower is unchanged.
        CheckpointError: Files that are missing or broken, or of another encoder.
    """
    folder = resolve(
        repo_or_folder,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
        allow_pickle=allow_pickle,
    )
    with open_checkpoint(folder, allow_pickle=allow_pickle) as checkpoint:
        return _load(tower, checkpoint, prefix)


_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}  # theirs to ours


@dataclass(frozen=True)
class _Source:
    """A layout of encoders.

    Attributes:
        name: How reports call it.
        patches: The name of its patch embedding; a checkpoint that has none is in another layout.
        table: The name of its position table.
        to_table: The published table -> [rows, cols, dim].
        keys: Everything but the table.
        heads: Patterns of what is left out.
        sines: Whether such encoders were also published without a table, with sines and cosines in its place.
    """

    name: str
    patches: str
    table: str
    to_table: Callable[[Tensor], Tensor]
    keys: KeyMap
    heads: tuple[str, ...] = ()
    sines: bool = False


def _load(tower: nn.Module, checkpoint: Checkpoint, prefix: str | None) -> StartingPoint:
    sources = next((known for kind, known in _SOURCES.items() if isinstance(tower, kind)), None)
    if sources is None:
        kinds = ", ".join(kind.__name__ for kind in _SOURCES)
        raise ConfigError(f"no starting point is known for {type(tower).__name__}, only for {kinds}")
    prefix = _prefix(checkpoint, sources, prefix)
    _refuse_another(tower, checkpoint.folder)
    part = checkpoint.part(prefix)
    sources = tuple(source for source in sources if prefix + source.patches in part.tensors)
    owner: Any = tower.positions
    table: Tensor | None = owner.table if owner is not None else None
    # A source without a table gives the tower one made of sines; the table is then no part of what is loaded.
    makes_sines = all(source.sines and prefix + source.table not in part.tensors for source in sources)
    if makes_sines:
        tower._modules["positions"] = None
    try:
        report = load_weights(tower, part, [_keys(source, table).mounted(theirs=prefix) for source in sources])
    finally:
        tower._modules["positions"] = owner
    source = sources[report.layout]
    if table is None:
        done = "none"
    elif makes_sines:
        done = "sines and cosines"
        if table.is_meta:
            owner.table = nn.Parameter(tower.get_parameter("norm.weight").new_empty(table.shape))
        with torch.no_grad():
            owner.table.copy_(sine_table(*table.shape))
    else:
        published = torch.empty(part.tensors[prefix + source.table].shape, device="meta")
        theirs, ours = ("{}x{}".format(*shape) for shape in (source.to_table(published).shape, table.shape))
        done = f"{theirs}, " + ("as published" if theirs == ours else f"resampled to {ours}")
    outside = tuple(name for name in checkpoint.tensors if name not in part.tensors)
    return StartingPoint(source.name, prefix, done, (*report.ignored, *outside))


def _refuse_another(tower: Any, folder: Path) -> None:
    """Refuse an encoder whose config.json states what shows in no shape, and states it otherwise than the tower's config.

    timm's config.json states none of this, and published ones leave out what the class of the encoder has as a default: what is
    not stated is not compared.
    """
    if not (folder / "config.json").is_file():
        return
    values = read_json(safe_file(folder, "config.json"))
    nested = values.get("vision_config")
    stated = nested if isinstance(nested, Mapping) else values
    config = tower.config
    if stated.get("hidden_size", config.dim) != config.dim:
        return  # shapes will tell; or the fields at the top are those of a language model
    activation = stated.get("hidden_act")
    own = {AIMv2: "silu", MoonViT: "gelu_tanh"}.get(type(tower)) or config.activation
    facts = [
        ("num_attention_heads", stated.get("num_attention_heads"), "num_heads", config.num_heads),
        ("patch_size", stated.get("patch_size"), "patch_size", config.patch_size),
        ("hidden_act", _ACTIVATIONS.get(str(activation), activation), "activation", own),
        *((name, stated.get(name), "norm_eps", config.norm_eps) for name in ("layer_norm_eps", "rms_norm_eps")),
    ]
    for name, theirs, field, ours in facts:
        # MoonViT was trained from SigLIP with its own epsilon.
        known = isinstance(tower, MoonViT) and (name, theirs, ours) == ("layer_norm_eps", 1e-6, 1e-5)
        if theirs is not None and theirs != ours and not known:
            raise ConfigError(
                f"{folder / 'config.json'}: {name} is {stated[name]!r}, the tower has {field}={ours!r}; make the tower with the "
                "sizes of the encoder"
            )


def _prefix(checkpoint: Checkpoint, sources: Sequence[_Source], wanted: str | None) -> str:
    """What stands before the names of the encoder, found by its patch embedding.

    Raises:
        CheckpointError: There is none, or several.
    """
    places = {
        name.removesuffix(source.patches)
        for source in sources
        for name in checkpoint.tensors
        if name == source.patches or name.endswith("." + source.patches)
    }
    found = sorted(place for place in places if wanted in (None, place))
    if len(found) > 1:
        raise CheckpointError(
            f"{checkpoint.folder}: encoders under {', '.join(map(repr, found))}; say which with prefix="
        )
    if not found:
        looked = ", ".join(dict.fromkeys(source.patches for source in sources))
        where = f" under {wanted!r}, only under {', '.join(map(repr, sorted(places)))}" if wanted and places else ""
        raise CheckpointError(
            f"{checkpoint.folder}: no patch embedding of such an encoder (looked for {looked}){where}"
        )
    return found[0]


def _keys(source: _Source, table: Tensor | None) -> KeyMap:
    """The map of one layout, in which the table comes out in the grid of the tower."""
    if table is None:
        positions = drop(source.table)
    else:
        rows, cols = table.shape[:2]
        positions = reshape(
            source.table, "positions.table", lambda t: _resampled(source.to_table(t), rows, cols), table_to_list
        )
    return source.keys + KeyMap(positions, *(drop(head) for head in source.heads)).read_only()


def _resampled(table: Tensor, rows: int, cols: int) -> Tensor:
    if tuple(table.shape[:2]) == (rows, cols):
        return table
    cells = interpolate_positions_reference(table.float(), Layout.from_grids([(rows, cols)]))
    return cells.unflatten(0, (rows, cols))


def sine_table(rows: int, cols: int, dim: int) -> Tensor:
    """The fixed table of the AIMv2 encoders that have no learned one, float32 [rows, cols, dim].

    Channels are sin(column w), cos(column w), sin(row w), cos(row w), each for w_k = 10000^(-4 k / dim), k = 0 ... dim/4 - 1.

    Raises:
        ConfigError: dim is not a multiple of 4.

    Matches: transformers' aimv2 with is_native=True, to 1e-6.
    """
    if dim % 4:
        raise ConfigError(f"a table of sines is a multiple of 4 wide, found dim={dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(cols, dtype=torch.float64), indexing="ij"
    )
    by_row, by_col = row[..., None] * frequencies, col[..., None] * frequencies
    return torch.cat([by_col.sin(), by_col.cos(), by_row.sin(), by_row.cos()], dim=-1).float()


def _linear_from_naflex(weight: Tensor) -> Tensor:
    """NaFlex encoders flatten a patch as (row, column, channel); ours is (channel, row, column)."""
    side = math.isqrt(weight.shape[1] // 3)
    return rearrange(weight, "dim (p q c) -> dim (c p q)", p=side, q=side, c=3)


def _naflex_from_linear(weight: Tensor) -> Tensor:
    side = math.isqrt(weight.shape[1] // 3)
    return rearrange(weight, "dim (c p q) -> dim (p q c)", p=side, q=side, c=3)


def _without_table(keys: KeyMap) -> KeyMap:
    return KeyMap(*(rule for rule in keys.rules if rule.ours is None or rule.ours.text != "positions.table"))


def _naflex(fixed: _Source, *, table: str, to_table: Callable[[Tensor], Tensor], stem: str | None = None) -> _Source:
    """The NaFlex form of a layout: its patch embedding, the first two rules, is a matrix over (row, column, channel)."""
    stem = stem or fixed.patches.removesuffix(".weight")
    patches = f"{stem}.weight"
    return replace(
        fixed,
        name=f"{fixed.name}, NaFlex",
        patches=patches,
        table=table,
        to_table=to_table,
        keys=KeyMap(
            reshape(patches, "patch_embed.proj.weight", _linear_from_naflex, _naflex_from_linear),
            rename(f"{stem}.bias", "patch_embed.proj.bias"),
            *fixed.keys.rules[2:],
        ),
    )


_TIMM_BLOCKS = (
    rename("blocks.{layer}.norm1.{kind}", "blocks.{layer}.norm1.{kind}"),
    rename("blocks.{layer}.norm2.{kind}", "blocks.{layer}.norm2.{kind}"),
    split("blocks.{layer}.attn.qkv.{kind}", "blocks.{layer}.attn.{part}.{kind}", part=("q", "k", "v")),
    rename("blocks.{layer}.attn.proj.{kind}", "blocks.{layer}.attn.out.{kind}"),
    rename("norm.{kind}", "norm.{kind}"),
)
_TIMM_HEADS = ("head.{path}", "attn_pool.{path}", "fc_norm.{path}")

_AIMV2 = (
    _Source(
        "Apple",
        patches="preprocessor.patchifier.proj.weight",
        table="preprocessor.pos_embed",
        to_table=list_to_table,
        keys=_without_table(aimv2.KEYS),
        heads=("head.{path}",),
        sines=True,
    ),
    _Source(
        "timm",
        patches="patch_embed.proj.weight",
        table="pos_embed",
        to_table=list_to_table,
        keys=KeyMap(
            reshape("patch_embed.proj.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv),
            rename("patch_embed.proj.bias", "patch_embed.proj.bias"),
            rename("patch_embed.norm.weight", "patch_norm.weight"),
            rename(
                "blocks.{layer}.mlp.{name}.weight",
                "blocks.{layer}.mlp.{name}.weight",
                name={"fc1_g": "gate", "fc1_x": "up", "fc2": "down"},
            ),
            *_TIMM_BLOCKS,
        ),
        heads=_TIMM_HEADS,
    ),
    _Source(
        "transformers",
        patches="embeddings.patch_embed.weight",
        table="embeddings.position_embedding.weight",
        to_table=list_to_table,
        keys=KeyMap(
            reshape("embeddings.patch_embed.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv),
            rename("embeddings.patch_embed.bias", "patch_embed.proj.bias"),
            rename("embeddings.rms_norm.weight", "patch_norm.weight"),
            rename("encoder.layers.{layer}.rms_norm1.weight", "blocks.{layer}.norm1.weight"),
            rename("encoder.layers.{layer}.rms_norm2.weight", "blocks.{layer}.norm2.weight"),
            rename(
                "encoder.layers.{layer}.attention.{name}.weight",
                "blocks.{layer}.attn.{name}.weight",
                name={"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"},
            ),
            rename(
                "encoder.layers.{layer}.ffn.{name}.weight",
                "blocks.{layer}.mlp.{name}.weight",
                name={"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
            ),
            rename("rms_norm.weight", "norm.weight"),
        ),
        heads=("head.{path}",),
        sines=True,
    ),
)

_SIGLIP_FIXED = _Source(
    "transformers",
    patches="embeddings.patch_embedding.weight",
    table="embeddings.position_embedding.weight",
    to_table=list_to_table,
    keys=_without_table(siglip2.keys("patch_embedding", convolution=True)),
    heads=("head.{path}",),
)
_SIGLIP_OF_TIMM = _Source(
    "timm",
    patches="patch_embed.proj.weight",
    table="pos_embed",
    to_table=list_to_table,
    keys=KeyMap(
        reshape("patch_embed.proj.weight", "patch_embed.proj.weight", conv_to_linear, linear_to_conv),
        rename("patch_embed.proj.bias", "patch_embed.proj.bias"),
        *_TIMM_BLOCKS,
        rename("blocks.{layer}.mlp.{name}.{kind}", "blocks.{layer}.mlp.{name}.{kind}"),
    ),
    heads=_TIMM_HEADS,
)
_SIGLIP = (
    _SIGLIP_FIXED,
    _naflex(_SIGLIP_FIXED, table="embeddings.position_embedding.weight", to_table=list_to_table),
    _SIGLIP_OF_TIMM,
    _naflex(_SIGLIP_OF_TIMM, table="embeds.pos_embed", to_table=lambda table: table[0], stem="embeds.proj"),
    _Source(
        "AndesVL",
        patches="embeddings.proj.weight",
        table="embeddings.pos_embed.weight",
        to_table=list_to_table,
        keys=_without_table(siglip2.KEYS),
    ),
)
_MOONVIT = _Source(
    "Kimi-VL",
    patches="patch_embed.proj.weight",
    table="patch_embed.pos_emb.weight",
    to_table=lambda table: table,
    keys=_without_table(moonvit.KEYS),
)
_SOURCES: Mapping[type[nn.Module], tuple[_Source, ...]] = {
    AIMv2: _AIMV2,
    SigLIP2: _SIGLIP,
    MoonViT: (*_SIGLIP, _MOONVIT),
}
