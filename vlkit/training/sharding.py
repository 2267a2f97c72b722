"""A model over many ranks: every rank keeps a share of each weight, its gradient and its optimizer state (FSDP2).

    make_mesh(replicate=, expert_parallel=) -> DeviceMesh
    shard_model(model, mesh)                   tower blocks, decoder blocks, projector; the rest in the root's group
    load_sharded(name, config, folder or repository, mesh)      from the start: no rank ever has the whole model

    model = shard_model(create_model("kimi-vl-tiny"), make_mesh(), param_dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())      # of DTensors: its state is sharded as they are
    model(batch).loss.backward()

A group is gathered as one when its module is called, and let go when it returns; its gradients are averaged over all
ranks and scattered. Embedding, head, norms, patch embedding and position tables are the root's group, which stays
gathered from the forward to the end of the backward: they are used outside of any block.

Blocks can be compiled before: `for block in blocks_of(model.llm): block.compile(dynamic=True)`, then `shard_model`; one graph
per kind of block (tried by hand with two families over two ranks: gradients 3e-16 from eager ones in fp64).

With expert parallelism experts lie on another mesh than the rest. Muon takes both, and clips over both (`max_grad_norm`);
`torch.nn.utils.clip_grad_norm_` does not, and torch's own optimizers need foreach=False where that is their default.

Checked over gloo on CPUs, 2 to 4 ranks, with torch 2.14. Nothing here asks for a kind of device, but nccl was not run.

Source: FSDP2, `torch.distributed.fsdp.fully_shard`; Zhao et al., arXiv:2304.11277.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from vlkit.errors import ConfigError
from vlkit.hub.repository import resolve
from vlkit.models.factory import build
from vlkit.models.pretrained import read_config
from vlkit.models.vlm import VisionLanguageModel, VLMConfig
from vlkit.optim.agree import raise_together, world
from vlkit.registry import list_models, model_spec
from vlkit.training.experts import parallel_experts
from vlkit.training.loading import allocate_shards, draw_shards, read_shards
from vlkit.training.recompute import blocks_of, num_elements

REPLICATE, SHARD, EXPERT = "replicate", "shard", "expert"


def make_mesh(*, replicate: int = 1, expert_parallel: int = 1, device_type: str | None = None) -> DeviceMesh:
    """All ranks as a grid with the axes "replicate", "shard" and "expert".

    Args:
        replicate: Copies of the sharded model (HSDP): weights are gathered inside a copy only, gradients are averaged
            over all. As a rule the number of machines.
        expert_parallel: Ranks over which the experts of a layer are spread; neighbours, because tokens travel between
            them at every layer.
        device_type: Such as "cuda"; None takes the accelerator that torch finds, or the CPU if the group runs on gloo.

    Raises:
        ConfigError: No process group, numbers that are none, or ranks that cannot be arranged so.
    """
    for name, value in (("replicate", replicate), ("expert_parallel", expert_parallel)):
        if type(value) is not int:
            raise ConfigError(f"make_mesh: {name} is a number of ranks, expected an int, found {value!r}")
    if not dist.is_initialized():
        raise ConfigError(
            "make_mesh needs a process group: start under torchrun, and call torch.distributed.init_process_group"
        )
    world, inner = dist.get_world_size(), replicate * expert_parallel
    if min(replicate, expert_parallel) < 1 or world % inner:
        raise ConfigError(
            f"{world} ranks cannot be arranged as replicate={replicate} x expert_parallel={expert_parallel} x shards; "
            "the product of the two must divide the number of ranks"
        )
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device_type = "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type
    return init_device_mesh(
        device_type, (replicate, world // inner, expert_parallel), mesh_dim_names=(REPLICATE, SHARD, EXPERT)
    )


def shard_model(
    model: VisionLanguageModel,
    mesh: DeviceMesh | None = None,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
) -> VisionLanguageModel:
    """Shard a model in place, block by block.

    What is to be frozen is frozen before the first forward. A model on meta stays there; see `load_sharded`.

    Args:
        model: The same weights on every rank, or on meta.
        mesh: From `make_mesh`; None is `make_mesh()`.
        param_dtype: Computation and gathering, such as torch.bfloat16; weights, gradients and optimizer state keep the
            dtype of the model. Router scores, norms, rotary angles, softmax and loss are fp32 inside, as everywhere. The
            model then trains and evaluates; `generate` makes its cache in the dtype of the weights, and needs None.
        reduce_dtype: In which gradients are averaged; never narrower than fp64 weights.
        reshard_after_forward: Let a block's weights go after its forward and gather them again in the backward (ZeRO-3);
            False keeps them until then (ZeRO-2): less traffic, more memory.

    Returns:
        The model.

    Raises:
        ConfigError: No model of vlkit, or a mesh without the axes of `make_mesh`.
    """
    if not isinstance(model, VisionLanguageModel):
        raise ConfigError(
            "shard_model takes a VisionLanguageModel, as create_model and from_pretrained give it, found "
            f"{type(model).__name__}; shard other modules with torch.distributed.fsdp.fully_shard: Muon takes their "
            "parameters too"
        )
    mesh = make_mesh() if mesh is None else mesh
    if mesh.mesh_dim_names != (REPLICATE, SHARD, EXPERT):
        raise ConfigError(f"shard_model takes a mesh of make_mesh, found the axes {mesh.mesh_dim_names}")
    if next(model.parameters()).dtype == torch.float64:
        reduce_dtype = None
    axes = _data_axes(mesh)
    spread = parallel_experts(model, mesh[EXPERT]) if mesh[EXPERT].size() > 1 else []
    inside = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    # A whole part gets features and patches, never angles, and may be in another dtype than what comes before it.
    part = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    options: dict[str, Any] = {"mesh": axes, "reshard_after_forward": reshard_after_forward}
    for experts in spread:
        whole = mesh[SHARD] if mesh[REPLICATE].size() == 1 else mesh[REPLICATE, SHARD]
        fully_shard(experts, mesh=whole, reshard_after_forward=reshard_after_forward, mp_policy=inside)
    tower = blocks_of(model.vision)
    for block in [*tower, *blocks_of(model.llm)]:
        fully_shard(block, mp_policy=inside, **options)
    if not tower:
        fully_shard(model.vision, mp_policy=part, **options)
    if num_elements(model.projector) >= max(map(num_elements, tower), default=0):
        fully_shard(model.projector, mp_policy=part, **options)
    # The backward begins with what the forward ends with, so the root's weights stay.
    fully_shard(model, mesh=axes, reshard_after_forward=False, mp_policy=inside)
    register_fsdp_forward_method(model, "decode")  # where generation enters
    model.parts_are_sharded = True
    return model


def load_sharded(
    source: str | os.PathLike[str] | VLMConfig,
    mesh: DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = torch.float32,
    reshard_after_forward: bool = True,
    prepare: Callable[[VisionLanguageModel], object] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> VisionLanguageModel:
    """Collective. A sharded model from its first moment: built on meta, sharded, then filled share by share.

    A registered name or a config gives freshly drawn weights, those of `create_model` after the same seed, bit for bit. A
    folder or repository in a family's Hub layout is read, each rank what it holds.

    Args:
        source: A registered name, a config, a folder or a repository id.
        mesh: As in `shard_model`.
        dtype: Of the weights; None is torch's default, whatever the files have.
        param_dtype: As in `shard_model`.
        reduce_dtype: As in `shard_model`.
        reshard_after_forward: As in `shard_model`.
        prepare: Called with the model on meta before it is sharded, such as to freeze parts.
        revision: As in `from_pretrained`, and so are cache_dir, token and local_files_only.
        options: strict, layout, check_finite, allow_quantized and allow_pickle, as in `from_pretrained`.

    Raises:
        CheckpointError: As `from_pretrained`, on all ranks.
        ConfigError: As `create_model` and `shard_model`.
    """
    mesh = make_mesh() if mesh is None else mesh
    folder = None
    if isinstance(source, VLMConfig):
        config = source
    elif str(source) in list_models() and not Path(source).is_dir():
        config = model_spec(str(source)).config
    else:
        hub_options = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        folder = _fetch(source, allow_pickle=options.get("allow_pickle", False), **hub_options)
        config = read_config(folder, allow_quantized=options.get("allow_quantized", False))
    model = build(config, dtype=dtype, device="meta")
    if prepare is not None:
        prepare(model)
    shard_model(
        model,
        mesh,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=reshard_after_forward,
    )
    allocate_shards(model, mesh.device_type)
    if folder is None:
        draw_shards(model)
    else:
        read_shards(model, folder, **options)
    return model


def _fetch(source: str | os.PathLike[str], **options: Any) -> Path:
    """The folder of a source. Rank 0 goes first; the others then find the files that it downloaded, or download their own."""
    for turn in (True, False):
        failure: Exception | None = None
        try:
            if (dist.get_rank() == 0) == turn:
                folder = resolve(source, **options)
        except Exception as error:
            failure = error
        raise_together(failure, world())
    return folder


def _data_axes(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of everything but experts: all ranks of a copy share its shards."""
    if mesh[EXPERT].size() == 1:
        return mesh[SHARD] if mesh[REPLICATE].size() == 1 else mesh[REPLICATE, SHARD]
    ranks = mesh.mesh.flatten(1)  # [copies, ranks of a copy]
    if len(ranks) == 1:
        return DeviceMesh(mesh.device_type, ranks[0], mesh_dim_names=(SHARD,))
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(REPLICATE, SHARD))
