"""Weights between a folder and a model: planned from names, refused before memory is taken, then streamed.

    resolve(repo_or_folder)                       -> folder                             (repository.py)
    open_checkpoint(folder)                       -> names, shapes, types; nothing read (checkpoint.py)
    load_weights(model, checkpoint, keys)         -> LoadReport; the model, built on meta, now has values
    save_weights(model, folder, keys)             -> the published names, shapes and types, in shards
    write_folder(target, write)                   -> publishes a whole folder or nothing (atomic.py)

    with torch.device("meta"):
        model = Model(config)
    with open_checkpoint(resolve("owner/name")) as checkpoint:
        load_weights(model, checkpoint, KEYS, dtype=torch.bfloat16, device="cuda")

    def write(folder):
        (folder / "config.json").write_text(...)
        save_weights(model, folder, KEYS)
    write_folder("runs/best", write, replaces=is_weight_file)

Loading holds one copy of the weights at most. On the CPU, what the files hold as it is stays in the mapped file until
somebody writes to it; everything else is copied from there straight into its place, row by row where experts are stacked,
and gives its pages back. Parameters take the type that is asked for; buffers keep the type that the model gives them:
a router's bias stays in fp32 when the rest is bf16.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vlkit.errors import CheckpointError, KeyMismatchError, NonFiniteWeightsError
from vlkit.hub.atomic import check_space, write_folder
from vlkit.hub.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from vlkit.hub.index import is_weight_file
from vlkit.hub.keymap import KeyMap, KeyReport, Shapes, Step, choose_keymap, collapse
from vlkit.hub.repository import resolve

__all__ = [
    "LoadReport",
    "check_space",
    "is_weight_file",
    "load_weights",
    "open_checkpoint",
    "refuse_another_head",
    "refuse_non_finite",
    "refuse_other_tensors",
    "resolve",
    "save_weights",
    "write_folder",
]

logger = logging.getLogger(__name__)

Holding = Callable[[Tensor], tuple[Tensor, tuple[slice, ...]]]
"""What is here of a tensor, as memory to write to, and where in the whole it lies."""

Gather = Callable[[Tensor, int | None], Tensor]
"""All of a tensor, or one row of it."""

LAYOUT = "vlkit_layout"  # entry in the header of the files
PATIENCE = 2.0  # seconds until a bar shows how far loading is, on a terminal
CHECKED_BY_DEFAULT = 10**8  # parameters up to which NaN and infinity are looked for without being asked: 0.03 s in bf16


@dataclass(frozen=True)
class LoadReport:
    """What loading did beyond copying.

    Attributes:
        missing: Parameters that no tensor filled and that were drawn anew (only with strict=False).
        unexpected: Tensors without a parameter (only with strict=False).
        ignored: Tensors that the key map says to ignore.
        cast: Published name -> its floating type in the files, where that is not the type in the model.
            `save_weights(dtypes=)` takes it to write the published types back.
        layout: Which of the key maps the checkpoint fits.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    cast: Mapping[str, torch.dtype] = field(default_factory=dict)
    layout: int = 0


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    keys: KeyMap | Sequence[KeyMap],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    strict: bool = True,
    layout: int | None = None,
    mapped: bool = True,
    check_finite: bool | None = None,
    allow_quantized: bool = False,
    holding: Holding | None = None,
) -> LoadReport:
    """Fill a model from a checkpoint.

    Args:
        model: Built on the meta device; its parameters are allocated here. Parameters that already have memory are
            filled in place, and keep their type and device.
        checkpoint: From `open_checkpoint`.
        keys: Published names <-> the names of this model; or several such layouts, of which the one that fits is taken.
        dtype: Of the parameters; "auto" is the type that most of the checkpoint's numbers have, with a warning if
            others lose precision by it.
        device: Where they are allocated.
        strict: False tolerates missing and unexpected names, never shapes. Missing parameters are drawn anew by their
            module's `reset_parameters`, and a warning lists them.
        layout: Which of the layouts it is, where names and shapes cannot tell; see `choose_keymap`.
        mapped: Let parameters on the CPU that the files hold as they are be views of the mapped files, until they are written
            to. False copies them, for files that somebody may overwrite in place.
        check_finite: Look for NaN and infinity; by default in models below 10^8 parameters.
        allow_quantized: Allow integers and 8-bit floats to be cast to floats, as bare numbers, without scales.
        holding: For parameters that lie on several ranks: which block of each is here. Only that is read.

    Returns:
        What was ignored, cast or missing.

    Raises:
        KeyMismatchError: Names or shapes that do not fit, all in one report. Nothing was allocated.
        CheckpointError: Types that do not fit, or a non-persistent buffer on meta, whose values no file has. Nothing was
            allocated.
        NonFiniteWeightsError: A tensor holds NaN or infinity.
    """
    _refuse_hidden_values(model)
    slots = _slots(model)
    ours = {name: tuple(slot.tensor.shape) for name, slot in slots.items()}
    try:
        found = choose_keymap(
            _listed(keys), checkpoint.shapes, ours, strict=strict, layout=layout, written=_claimed(checkpoint)
        )
    except KeyMismatchError as error:
        raise KeyMismatchError(f"{checkpoint.folder}: {error}") from None
    steps, report = found.steps, found.report
    automatic = dtype == "auto"
    if dtype == "auto":
        dtype = _usual_dtype(steps, checkpoint)
    for slot in slots.values():
        if slot.tensor.is_meta and slot.is_parameter and slot.tensor.dtype.is_floating_point:
            slot.dtype = dtype
    cast = _casts(steps, checkpoint, slots, allow_quantized)
    narrowed = [name for name, stored in cast.items() if automatic and _rounds(stored, dtype)]
    if narrowed:
        warnings.warn(
            f"{checkpoint.folder}: {', '.join(collapse(narrowed)[:5])} rounded to {_name(dtype)}, the type of most "
            f"weights; dtype={cast[narrowed[0]]} keeps them",
            stacklevel=2,
        )
    if check_finite is None:
        check_finite = _is_small(_tensors(model))

    _allocate_missing(model, slots, report, torch.device(device))
    # In the order of the files, so that disks read forward and one file is mapped at a time.
    order = sorted(steps, key=lambda step: _place(checkpoint, step))
    stays = mapped and torch.device(device).type == "cpu"
    with torch.no_grad():
        for step in tqdm(
            order, f"loading {checkpoint.folder.name}", unit="tensor", leave=False, delay=PATIENCE, disable=None
        ):
            slot = slots[step.target]
            if slot.tensor.is_meta:
                view = _as_it_lies(step, slot.dtype, checkpoint) if stays else None
                if view is not None:
                    slot.fill(view)
                    if check_finite:
                        _check_finite(view, view, step.sources[0], step.target)
                    continue
                slot.fill(torch.empty(slot.tensor.shape, dtype=slot.dtype, device=device))
            local, place = (holding or _all_of)(slot.tensor)
            for row, source in enumerate(step.sources):
                target, block = local, place
                if step.rule.over is not None:
                    first, last, _ = place[0].indices(step.shape[0])
                    if not first <= row < last:
                        continue
                    target, block = local[row - first], place[1:]
                piece = step.piece(row, checkpoint.read)[block]
                target.copy_(piece)
                if check_finite:
                    _check_finite(target, piece, source, step.target)
                checkpoint.release(source)
    checkpoint.close()
    _report(model, checkpoint, report, cast, slots)
    floats = {name: stored for name, stored in cast.items() if _is_plain_float(stored)}
    return LoadReport(tuple(report.missing), tuple(report.unexpected), tuple(report.ignored), floats, found.index)


def _all_of(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    return tensor, (slice(None),) * tensor.ndim


def refuse_another_head(
    head: Tensor,
    folder: Path,
    ignored: Sequence[str],
    *,
    allow_pickle: bool = False,
    holding: Holding | None = None,
) -> None:
    """A tied head may stand in the files a second time; one with other numbers must not be dropped in silence.

    Args:
        head: Of the loaded model, which is its embedding.
        folder: What it was loaded from.
        ignored: Names of the files that the model has no use for; see `LoadReport`.
        allow_pickle: As in loading.
        holding: As in loading.

    Raises:
        KeyMismatchError: The files hold another head.
    """
    heads = [name for name in ignored if name.endswith("lm_head.weight")]
    if not heads:
        return
    local, place = (holding or _all_of)(head)
    with open_checkpoint(folder, allow_pickle=allow_pickle) as checkpoint:
        for name in heads:
            if not torch.equal(checkpoint.read(name)[place].to(local), local):
                raise KeyMismatchError(
                    f"{folder}: {name} differs from the embedding, but the config ties them; set tie_word_embeddings to false"
                )


def refuse_other_tensors(model: nn.Module, wanted: nn.Module) -> None:
    """Refuse a model whose names and shapes are not those of another: of what its config makes.

    Args:
        model: About to be saved.
        wanted: The model that loading would fill; on meta.

    Raises:
        KeyMismatchError: Tensors that are too many, missing, or of another shape.
    """
    found, expected = ({name: tuple(slot.tensor.shape) for name, slot in _slots(m).items()} for m in (model, wanted))
    lines = [
        f"  {name}: the model has {found.get(name, 'none')}, its config means {expected.get(name, 'none')}"
        for name in dict.fromkeys([*found, *expected])
        if found.get(name) != expected.get(name)
    ]
    if lines:
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise KeyMismatchError(
            "the model's tensors are not those of its config, so what is saved could not be loaded:\n"
            + "\n".join(lines[:10])
            + more
            + "\nset model.config to what the model is, such as model.config.replace(llm=model.config.llm.replace(...))"
        )


def refuse_non_finite(model: nn.Module | Mapping[str, Tensor], check_finite: bool | None = None) -> None:
    """Refuse a model that loading would refuse for its numbers.

    Args:
        model: About to be saved; or its tensors by name.
        check_finite: Whether to look; None looks in models below 10^8 parameters.

    Raises:
        NonFiniteWeightsError: A tensor holds NaN or infinity.
    """
    tensors = _tensors(model)
    if not (_is_small(tensors) if check_finite is None else check_finite):
        return
    for name, tensor in tensors.items():
        if not tensor.is_meta and not _is_finite(tensor):
            raise NonFiniteWeightsError(
                f"{name} holds NaN or infinity; save_pretrained(check_finite=False) writes it anyway"
            )


def save_weights(
    model: nn.Module | Mapping[str, Tensor],
    folder: Path,
    keys: KeyMap | Sequence[KeyMap],
    *,
    layout: int = 0,
    max_shard_size: int | str = "5GB",
    dtypes: Mapping[str, torch.dtype] | None = None,
    metadata: Mapping[str, str] | None = None,
    gather: Gather | None = None,
) -> list[str]:
    """Write a model's weights under their published names. Made for the folder that `write_folder` hands out.

    Args:
        model: A model, or its tensors by name.
        folder: An existing folder without weights.
        keys: Published names <-> the names of this model; or several such layouts.
        layout: Which of them is written. Where names and shapes would fit another one too, the files say which it is.
        max_shard_size: Bytes of a file, or a text such as "5GB".
        dtypes: Published name -> type to write it in, such as `LoadReport.cast`; others are written as they are.
        metadata: Texts for the headers of the files.
        gather: For tensors that lie on several ranks: gives the whole, or one row of a stack.

    Returns:
        Names of the written files.

    Raises:
        KeyMismatchError: A parameter without a published name.
        CheckpointError: A parameter without values (on meta), or parts of one tensor in different types.
        DiskFullError: The weights do not fit; nothing was written.
    """
    state = _tensors(model)
    on_meta = [name for name, tensor in state.items() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(f"cannot save parameters without values (on meta): {', '.join(collapse(on_meta)[:10])}")
    maps = _listed(keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    steps = maps[layout].plan_save(shapes)
    by_name = {step.target: step for step in steps}
    wanted: dict[str, torch.dtype] = {}
    for step in steps:
        found = {state[source].dtype for source in step.sources}
        if len(found) > 1:
            names = ", ".join(f"{source} {state[source].dtype}" for source in step.sources)
            raise CheckpointError(f"{step.target} is one tensor, but its parts have different types: {names}")
        wanted[step.target] = (dtypes or {}).get(step.target, found.pop())

    def part(source: str, row: int | None) -> Tensor:
        if gather is not None:
            return gather(state[source], row)
        return state[source] if row is None else state[source][row]

    def read(name: str) -> Tensor:
        with torch.no_grad():
            return by_name[name].save_from(part).to(wanted[name])

    tensors = [(step.target, wanted[step.target], step.shape) for step in steps]
    if not _is_plain(maps, layout, {name: shape for name, _, shape in tensors}, shapes):
        metadata = {"format": "pt", **(metadata or {}), LAYOUT: str(layout)}
    return write_checkpoint(folder, tensors, read, max_shard_size=max_shard_size, metadata=metadata)


def _listed(keys: KeyMap | Sequence[KeyMap]) -> list[KeyMap]:
    return [keys] if isinstance(keys, KeyMap) else list(keys)


def _claimed(checkpoint: Checkpoint) -> int | None:
    """The layout that the files say they are in; see `save_weights`."""
    text = checkpoint.metadata.get(LAYOUT, "")
    return int(text) if re.fullmatch("[0-9]{1,3}", text) else None


def _is_plain(maps: list[KeyMap], layout: int, theirs: Shapes, ours: Shapes) -> bool:
    """Whether names and shapes alone tell in which layout something is written."""
    try:
        return len(maps) == 1 or choose_keymap(maps, theirs, ours).index == layout
    except KeyMismatchError:
        return False


class _Slot:
    """One parameter or persistent buffer, and every place in the model that holds it."""

    def __init__(self, tensor: Tensor, is_parameter: bool) -> None:
        self.tensor, self.is_parameter = tensor, is_parameter
        self.dtype = tensor.dtype
        self.places: list[tuple[nn.Module, str]] = []

    def fill(self, value: Tensor) -> None:
        """Put a new tensor where the one on meta was."""
        if self.is_parameter:
            value = nn.Parameter(value, requires_grad=self.tensor.requires_grad)
            value.__dict__.update(self.tensor.__dict__)
        for module, name in self.places:
            (module._parameters if self.is_parameter else module._buffers)[name] = value  # type: ignore[assignment]
        self.tensor = value


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Parameters and persistent buffers by name; tied ones once, under their first name."""
    slots: dict[str, _Slot] = {}
    by_tensor: dict[int, _Slot] = {}
    for prefix, module in model.named_modules():
        for name, tensor, is_parameter in _own_tensors(module):
            slot = by_tensor.get(id(tensor))
            if slot is None:
                slot = by_tensor[id(tensor)] = _Slot(tensor, is_parameter)
                slots[f"{prefix}.{name}" if prefix else name] = slot
            slot.places.append((module, name))
    return slots


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter, True
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer, False


def _refuse_hidden_values(model: nn.Module) -> None:
    hidden = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
        if (buffer := module._buffers.get(name)) is not None and buffer.is_meta
    ]
    if hidden:
        raise CheckpointError(
            f"buffers on meta that no checkpoint holds: {', '.join(collapse(hidden)[:5])}; compute them in forward, or "
            f"build the model on its device"
        )


def _place(checkpoint: Checkpoint, step: Step) -> tuple[str, int]:
    source = step.sources[0]
    return str(checkpoint.file_of[source]), checkpoint.tensors[source].start


def _usual_dtype(steps: list[Step], checkpoint: Checkpoint) -> torch.dtype:
    """The floating type that most of the checkpoint's numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for name in dict.fromkeys(source for step in steps for source in step.sources):
        info = checkpoint.tensors[name]
        if _is_plain_float(info.dtype):
            counts[info.dtype] += info.num_bytes // info.dtype.itemsize
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _casts(
    steps: list[Step], checkpoint: Checkpoint, slots: Mapping[str, _Slot], allow_quantized: bool
) -> dict[str, torch.dtype]:
    """Published name -> its type, where the model has another. Refuses casts that change what the numbers mean."""
    casts: dict[str, torch.dtype] = {}
    refused: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for step in steps:
        into = slots[step.target].dtype
        for source in step.sources:
            stored = checkpoint.tensors[source].dtype
            if stored == into:
                continue
            casts[source] = stored
            if not into.is_floating_point or stored.is_complex or not (_is_plain_float(stored) or allow_quantized):
                refused.setdefault((stored, into), []).append(source)
    if refused:
        lines = [
            f"  {_name(stored)} into {_name(into)}: {', '.join(collapse(names)[:5])}"
            for (stored, into), names in refused.items()
        ]
        raise CheckpointError(
            f"{checkpoint.folder}: a cast would change what the numbers mean (quantised weights need their scales):\n"
            + "\n".join(lines)
            + "\nload an unquantised checkpoint, or pass allow_quantized=True to take the bare numbers"
        )
    return casts


def _allocate_missing(model: nn.Module, slots: Mapping[str, _Slot], report: KeyReport, device: torch.device) -> None:
    """Give the modules that miss parameters fresh ones; what the checkpoint has is filled in afterwards."""
    owners: dict[int, nn.Module] = {}
    for name in report.missing:
        slot = slots[name]
        if slot.tensor.is_meta:
            slot.fill(torch.empty(slot.tensor.shape, dtype=slot.dtype, device=device))
        owners.update((id(module), module) for module, _ in slot.places)
    paths = {id(module): path for path, module in model.named_modules()}
    for module in owners.values():
        reset = getattr(module, "reset_parameters", None)
        if reset is None:
            raise CheckpointError(
                f"{paths[id(module)] or type(module).__name__} misses parameters and has no reset_parameters"
            )
        reset()


def _as_it_lies(step: Step, dtype: torch.dtype, checkpoint: Checkpoint) -> Tensor | None:
    """The parameter as a view of its mapped file, where the file holds it as it is, or as one block of a tensor."""
    source = step.sources[0]
    if not checkpoint.mapped or step.rule.over is not None or checkpoint.tensors[source].dtype != dtype:
        return None
    whole = checkpoint.read(source)
    return checkpoint.in_place(source, whole, step.rule.block(whole, step.part))


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: slot.tensor for n, slot in _slots(model).items()} if isinstance(model, nn.Module) else dict(model)


def _is_small(tensors: Mapping[str, Tensor]) -> bool:
    return sum(tensor.numel() for tensor in tensors.values()) < CHECKED_BY_DEFAULT


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    # Both ends are NaN if any number is; one pass, where a test of every number takes many.
    return all(map(math.isfinite, torch.aminmax(tensor.detach())))


def _check_finite(target: Tensor, piece: Tensor, source: str, name: str) -> None:
    if _is_finite(target):
        return
    finite = torch.isfinite(target)
    bad = (~finite).nonzero()
    overflow = bool(torch.isfinite(piece).all())
    what = f"overflows {_name(target.dtype)}; load it as bfloat16 or float32" if overflow else "is NaN or infinite"
    raise NonFiniteWeightsError(
        f"{source} ({name}): {len(bad)} of {target.numel()} numbers: the first, at {bad[0].tolist()}, {what}; "
        f"check_finite=False loads it anyway"
    )


def _report(
    model: nn.Module,
    checkpoint: Checkpoint,
    report: KeyReport,
    cast: Mapping[str, torch.dtype],
    slots: Mapping[str, _Slot],
) -> None:
    for stored, count in Counter(cast.values()).items():
        logger.info("%s: %d tensors were cast from %s", checkpoint.folder, count, _name(stored))
    if report.missing or report.unexpected:
        warnings.warn(
            f"{checkpoint.folder}: loaded in part. {report}\nmissing parameters were drawn anew", stacklevel=3
        )
    left = [name for name, slot in slots.items() if slot.tensor.is_meta]
    assert not left, f"not filled: {left}"


def _rounds(stored: torch.dtype, into: torch.dtype) -> bool:
    return _is_plain_float(stored) and torch.promote_types(stored, into) != into


def _is_plain_float(dtype: torch.dtype) -> bool:
    """A float whose numbers mean what they say; 8-bit floats need scales."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
