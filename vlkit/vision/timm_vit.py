"""Any plain vision transformer of timm, by name, with images of every size packed end to end.

    patches -> timm's patch embedding + its table, resampled -> [class and register tokens of each image, its patches]
            -> timm's blocks, attention inside each image -> the patches -> timm's norm -> features

    vlkit.compose(vision="timm:vit_small_patch14_dinov2.lvd142m", llm="qwen3-0.6b")

The modules and their names are timm's own (q, k and v stay one matrix), so its checkpoints load as they are; only attention
is replaced. Supported are timm's VisionTransformer (DINOv2, SigLIP, CLIP, AugReg, DeiT, ...) and Eva (EVA-02, DINOv3) with
their options: class and register tokens, layer scale, norms of q and k, gated MLPs, rotary positions. What is hierarchical or
convolutional has no patches that could be packed, and is refused. Nothing is fetched unless `load_pretrained` is called.

Source: PyTorch Image Models, github.com/huggingface/pytorch-image-models.
Matches: timm's forward_features at the model's own size and, with dynamic_img_size, at others, to 1e-5 in fp32.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlkit.config import Config, Depth
from vlkit.errors import ConfigError, KeyMismatchError, MissingDependencyError, UnknownModelError
from vlkit.layers.attention import Backend, attention
from vlkit.layers.heads import HeadAxis, Heads, head_columns, head_rows
from vlkit.layers.position import interpolate_positions
from vlkit.layers.rope import Pairing, Rotary, apply_rotary
from vlkit.packing import Layout, Packed, Segments
from vlkit.registry import register_component, register_prefix
from vlkit.vision.tower import PixelStatistics, check_patches, run_blocks

Argument = bool | int | float | str

TRUNKS = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
BLOCKS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm")
ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")
ROPES = ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3")
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")
# Arguments of timm.create_model that fetch or read files, or make something else than a tower; a config may be a stranger's.
REFUSED = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "scriptable", "exportable",
    "no_jit", "num_classes", "features_only", "out_indices", "device", "dtype",
}  # fmt: skip
MAX_ARGUMENT, MAX_DEPTH = 2**20, 4096


class TimmViTConfig(Config):
    """Which of timm's vision transformers.

    Attributes:
        name: As timm.list_models says it; a tag behind a dot chooses the pretrained weights, which are not loaded here.
        arguments: What timm.create_model gets besides, as pairs: (("img_size", 448), ("depth", 6)).
        num_layers: Blocks that are kept, from the first; None keeps all. Features of a middle layer come from here.
        final_norm: Whether the model's last norm is applied; features of a middle layer are often taken without.
        antialias: Whether shrinking the position table averages more of it. timm does; the original DINOv2 does not.
    """

    name: str = "vit_base_patch16_224"
    arguments: tuple[tuple[str, Argument], ...] = ()
    num_layers: Depth | None = None
    final_norm: bool = True
    antialias: bool = True

    def check(self) -> None:
        names = [name for name, _ in self.arguments]
        for name, value in self.arguments:
            if name in REFUSED or names.count(name) > 1:
                reason = "is given twice" if name not in REFUSED else "is not a size or an option of the architecture"
                raise ConfigError(f"TimmViTConfig.arguments: {name!r} {reason}")
            limit = MAX_DEPTH if name == "depth" else MAX_ARGUMENT
            if isinstance(value, (int, float)) and not abs(value) <= limit:
                raise ConfigError(f"TimmViTConfig.arguments: {name}={value} is beyond {limit}")

    @property
    def facts(self) -> Facts:
        """What timm says of the model; it is built once, without memory.

        Raises:
            UnknownModelError: timm has no such model.
            ConfigError: One that cannot be packed, or arguments that it does not take.
        """
        return _facts(self.name, self.arguments, self.num_layers)

    @property
    def patch_size(self) -> int:
        """Side of a square patch, in pixels."""
        return self.facts.patch_size

    @property
    def in_channels(self) -> int:
        """Colour channels of a patch."""
        return self.facts.in_channels

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch."""
        return self.in_channels * self.patch_size**2

    @property
    def out_dim(self) -> int:
        """Width of the features."""
        return self.facts.dim

    @property
    def pixel_statistics(self) -> PixelStatistics:
        """Mean and spread by which timm normalises pixels for this model's weights."""
        return self.facts.pixel_statistics


class Facts(NamedTuple):
    """What the rest of a model has to know of a timm model."""

    patch_size: int
    in_channels: int
    dim: int
    num_layers: int
    pixel_statistics: PixelStatistics


@cache
def _facts(name: str, arguments: tuple[tuple[str, Argument], ...], num_layers: int | None) -> Facts:
    with torch.device("meta"):
        trunk = _make_trunk(name, dict(arguments))
    depth = len(trunk.blocks)
    if num_layers is not None and num_layers > depth:
        raise ConfigError(f"TimmViTConfig.num_layers: {num_layers} of the {depth} blocks of {name}")
    weight = trunk.patch_embed.proj.weight
    published = trunk.pretrained_cfg
    pixels = PixelStatistics(tuple(published["mean"]), tuple(published["std"]))
    return Facts(weight.shape[-1], weight.shape[1], trunk.embed_dim, num_layers or depth, pixels)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError("timm's towers need timm: pip install timm") from error
    return timm


def _make_trunk(name: str, arguments: dict[str, Argument], **more: Any) -> Any:
    """timm's model with freshly drawn weights, checked to be one whose patches can be packed."""
    timm = _timm()
    if ":" in name or "/" in name:
        raise ConfigError(
            f"TimmViTConfig.name: {name!r} is a repository or a folder; give the name of an architecture, as "
            "timm.list_models says it, and load weights with load_pretrained"
        )
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.3)
        raise UnknownModelError(
            f"timm {timm.__version__} has no model {name!r}" + (f"; the nearest are {', '.join(near)}" if near else "")
        )
    try:
        trunk = timm.create_model(name, pretrained=False, num_classes=0, **arguments, **more)
    except Exception as error:  # of any kind: what timm does with a wrong argument differs from model to model
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "none"
        raise ConfigError(
            f"timm cannot make {name} with the arguments {given}: {str(error) or type(error).__name__}"
        ) from error
    reason = _why_not_packed(trunk)
    if reason is not None:
        raise ConfigError(
            f"timm's {name} cannot take packed images of any size: {reason}. Plain vision transformers can: "
            f"{', '.join(TRUNKS)} of timm, such as vit_small_patch14_dinov2.lvd142m"
        )
    return trunk


def _why_not_packed(trunk: Any) -> str | None:
    kind = type(trunk).__name__
    if kind not in TRUNKS:
        return f"its class is {kind}"
    embed = trunk.patch_embed
    if type(embed).__name__ != "PatchEmbed" or embed.proj.kernel_size != embed.proj.stride:
        return f"its patches come out of a {type(embed).__name__}, not out of one convolution"
    if embed.proj.kernel_size[0] != embed.proj.kernel_size[1]:
        return f"its patches of {embed.proj.kernel_size} pixels are not square"
    for block in trunk.blocks:
        if type(block).__name__ not in BLOCKS:
            return f"its blocks are {type(block).__name__}"
        if type(block.attn).__name__ not in ATTENTIONS:
            return f"its attention is {type(block.attn).__name__}"
    rope = getattr(trunk, "rope", None)
    if rope is not None and type(rope).__name__ not in ROPES:
        return f"its rotary positions are {type(rope).__name__}"
    if getattr(trunk, "patch_drop", None) is not None and not isinstance(trunk.patch_drop, nn.Identity):
        return "patches are dropped in training (patch_drop_rate)"
    dropping = [name for name, module in trunk.named_modules() if type(module).__name__ == "DropPath"]
    dropping += [name for name, module in trunk.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    return f"{dropping[0]} drops at random" if dropping else None


class Context(NamedTuple):
    """What attention needs to know; it travels through timm's blocks in the place of a mask."""

    rotary: Rotary | None
    segments: Segments
    backend: Backend


class PackedAttention(nn.Module):
    """One of timm's attention modules, with its submodules under their names, over packed tokens."""

    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Any
    v_bias: Any
    q_norm: Any
    k_norm: Any
    norm: Any
    gate: Any
    proj: Any

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = theirs.num_heads, theirs.scale
        self.num_kv_heads = getattr(theirs, "num_kv_heads", theirs.num_heads)
        self.pairing: Pairing = "half" if getattr(theirs, "rotate_half", False) else "interleaved"
        for name in PackedAttention.__annotations__:
            setattr(self, name, getattr(theirs, name, None))

    def reset_parameters(self) -> None:
        """Only EVA has biases of its own, beside one matrix for q, k and v."""
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def head_axes(self) -> dict[str, HeadAxis]:
        """The heads in each projection; see vlkit.layers.heads."""
        head_dim = self.proj.in_features // self.num_heads
        counts = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        if self.qkv is None:
            rows = {f"{role}_proj": head_rows(role, count, head_dim) for role, count in counts.items()}
        else:
            heads = (Heads(count, ((role, head_dim),)) for role, count in counts.items())
            rows = {"qkv": HeadAxis(0, tuple(heads))}
        return {**rows, "proj": head_columns(self.num_heads, head_dim)}

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q, k, v) if self.q_bias is None else (q + self.q_bias, k, v + self.v_bias)

    def forward(
        self, x: Float[Tensor, "tokens dim"], *, attn_mask: Context, rope: None = None, is_causal: bool = False
    ) -> Float[Tensor, "tokens dim"]:
        rotary, segments, backend = attn_mask
        q, k, v = self._project(x)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, -1)))
        k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, -1)))
        v = v.unflatten(-1, (self.num_kv_heads, -1))
        if rotary is not None:
            q, k = apply_rotary(q, rotary, pairing=self.pairing), apply_rotary(k, rotary, pairing=self.pairing)
        out = self.norm(attention(q, k, v, layout=segments, scale=self.scale, backend=backend).flatten(-2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj(out)


class TimmViT(nn.Module):
    """The tower.

    Attributes:
        trunk: timm's model without its head.
        gradient_checkpointing: Recompute each block's activations in the backward instead of keeping them.
        attention_backend: See vlkit.layers.attention.
    """

    def __init__(self, config: TimmViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend: Backend = "auto"
        facts = config.facts  # raises before memory is taken
        # Eva's rotary module then makes angles for any grid, instead of keeping those of one.
        more = {"dynamic_img_size": True} if "dynamic_img_size" not in dict(config.arguments) else {}
        trunk: Any = _make_trunk(config.name, dict(config.arguments), **more)
        del trunk.blocks[facts.num_layers :]
        for name in ("head", "head_dist", "fc_norm"):
            if hasattr(trunk, name):
                setattr(trunk, name, nn.Identity())
        trunk.attn_pool = None
        if not config.final_norm:
            trunk.norm = nn.Identity()
        for block in trunk.blocks:
            block.attn = PackedAttention(block.attn)
        # Not a submodule: its buffers are derived, in no checkpoint, and stay in fp32.
        self._rope = (getattr(trunk, "rope", None),)
        trunk.rope = None
        self.trunk = trunk

    def reset_parameters(self) -> None:
        """Weights as timm draws them."""
        for module in self.trunk.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self.trunk and callable(reset):
                reset()
        self.trunk.init_weights()

    def load_pretrained(self, weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None) -> None:
        """Fill the tower with pretrained weights.

        Args:
            weights: A .safetensors file or a state dict with timm's names for this architecture; None lets timm download those
                that belong to the model's name. Weights of the head and of blocks that are not kept are left out.

        Raises:
            KeyMismatchError: Names or shapes that do not fit.
        """
        state: Mapping[str, Tensor]
        if weights is None:
            model = _timm().create_model(
                self.config.name, pretrained=True, num_classes=0, **dict(self.config.arguments)
            )
            state = model.state_dict()
        elif isinstance(weights, Mapping):
            state = weights
        else:
            from safetensors.torch import load_file

            if Path(weights).suffix != ".safetensors":
                raise ConfigError(
                    f"{weights}: expected a .safetensors file; read others yourself and give a state dict"
                )
            state = load_file(weights)
        ours = self.trunk.state_dict()
        left_out = tuple(f"blocks.{n}." for n in range(len(self.trunk.blocks), 4096))
        spare = (*HEADS, *left_out, "mask_token", *(() if self.config.final_norm else ("norm.",)))
        missing = [name for name in ours if name not in state]
        extra = [name for name in state if name not in ours and not name.startswith(spare)]
        shapes = [
            f"{name} {list(state[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in ours.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if missing or extra or shapes:
            problems = [f"missing {', '.join(missing[:5])}"] * bool(missing)
            problems += [f"unknown {', '.join(extra[:5])}"] * bool(extra)
            problems += [f"of another shape {'; '.join(shapes[:5])}"] * bool(shapes)
            raise KeyMismatchError(f"weights do not fit timm's {self.config.name}: " + "; ".join(problems))
        self.trunk.load_state_dict({name: state[name] for name in ours})

    def forward(self, patches: Packed) -> Packed:
        """Features of every patch.

        Args:
            patches: [patches, patch_dim], each flattened as (channel, row, column); the layout has grids. Cast to the
                dtype of the tower. The time steps of a clip are images of their own.

        Returns:
            [patches, out_dim] with the same layout; class and register tokens are left out.

        Raises:
            LayoutError: No grids, patches of another size, or another grid than the table's where no table is kept.
        """
        check_patches(self.config, patches)
        frames, trunk = patches.layout.frames(), self.trunk
        proj = trunk.patch_embed.proj
        x = F.linear(patches.tokens.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        x = trunk.patch_embed.norm(x)
        tokens = [getattr(trunk, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        first = [token[0] for token in tokens if token is not None]
        prefix = torch.cat(first) if first else x.new_empty(0, x.shape[1])  # [prefix tokens, dim]
        if trunk.pos_embed is not None:
            own = 0 if trunk.no_embed_class else len(prefix)
            table = trunk.pos_embed[0, own:].unflatten(0, trunk.patch_embed.grid_size)
            x = x + interpolate_positions(table, frames, antialias=self.config.antialias).to(x.dtype)
            prefix = prefix + trunk.pos_embed[0, :own] if own else prefix
        joined, places = _behind_prefix(frames, len(prefix))
        places = places.to(x.device)
        rotary = self.rotary(frames, places, joined, device=x.device)
        if len(prefix):
            starts = torch.tensor(joined.offsets[:-1], device=x.device)
            before = (starts[:, None] + torch.arange(len(prefix), device=x.device)).flatten()
            whole = x.new_zeros(joined.num_tokens, x.shape[1]).index_copy(0, places, x)
            x = whole.index_copy(0, before, prefix.to(x.dtype).repeat(frames.num_items, 1))
        x = self.forward_blocks(trunk.norm_pre(x), rotary, joined.segments(x.device))
        x = x.index_select(0, places) if len(prefix) else x
        return Packed(trunk.norm(x), patches.layout)

    def forward_blocks(
        self, x: Float[Tensor, "tokens dim"], rotary: Rotary | None, segments: Segments
    ) -> Float[Tensor, "tokens dim"]:
        """The block stack; all that depends on the layout comes as tensors, so it compiles once for all image sizes."""
        blocks: Any = [partial(_run_timm_block, block) for block in self.trunk.blocks]
        return run_blocks(
            blocks, x, rotary, segments, recompute=self.gradient_checkpointing, backend=self.attention_backend
        )

    def rotary(
        self, frames: Layout, places: Tensor, joined: Layout, *, device: torch.device | str | None = None
    ) -> Rotary | None:
        """Cosines and sines of all tokens, as timm's own module makes them for every grid; prefix tokens are not turned."""
        rope = self._rope[0]
        if rope is None:
            return None
        if any(buffer.is_meta for buffer in rope.buffers()):
            rope.to_empty(device="cpu")
            rope.reset_parameters()
        rope.eval()  # in training some ropes are shaken
        angles = torch.cat([rope.get_embed(shape=(rows, columns)) for _, rows, columns in frames.grids or ()])
        half = self.trunk.blocks[0].attn.pairing == "half"
        sin, cos = (part[:, : part.shape[1] // 2] if half else part[:, ::2] for part in angles.chunk(2, dim=-1))
        sin, cos = (part.contiguous().to(device) for part in (sin, cos))
        if joined.num_tokens == frames.num_tokens:
            return Rotary(cos, sin)
        still = cos.new_ones(joined.num_tokens, cos.shape[1]), sin.new_zeros(joined.num_tokens, sin.shape[1])
        return Rotary(still[0].index_copy(0, places, cos), still[1].index_copy(0, places, sin))


def _run_timm_block(
    block: nn.Module, x: Tensor, rotary: Rotary | None, segments: Segments, *, backend: Backend
) -> Tensor:
    return block(x, attn_mask=Context(rotary, segments, backend))


def _behind_prefix(layout: Layout, count: int) -> tuple[Layout, Tensor]:
    """The layout with `count` tokens before each item, and where the items' own tokens then are, int64."""
    joined = Layout(tuple(length + count for length in layout.lengths))
    return joined, torch.arange(layout.num_tokens) + count * (layout.item_ids().long() + 1)


def named_timm(name: str) -> TimmViTConfig:
    """The config of timm's model of this name.

    Raises:
        UnknownModelError: timm has no such model; the message has the nearest.
        ConfigError: One that cannot take packed images.
    """
    config = TimmViTConfig(name=name)
    _ = config.facts
    return config


register_component(
    "vision",
    TimmViTConfig,
    TimmViT,
    {
        "timm": TimmViTConfig(),
        "timm-tiny": TimmViTConfig(
            name="vit_small_patch14_reg4_dinov2",
            arguments=(("img_size", 24), ("patch_size", 4), ("embed_dim", 32), ("depth", 2), ("num_heads", 2)),
        ),
    },
)
register_prefix("vision", "timm", named_timm)
