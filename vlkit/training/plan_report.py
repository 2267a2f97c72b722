"""A plan as text that people read: what it is, what it takes, and what that is made of."""

from __future__ import annotations

from vlkit.summary import num_bytes, short
from vlkit.training.plan import Operations, Plan

Row = tuple[str, str]


def report(plan: Plan) -> str:
    """Sections of aligned lines."""
    sections = [
        (_title(plan), _parameters(plan)),
        ("memory of one rank", _memory(plan)),
        ("operations", _operations(plan)),
        ("sent by one rank in one step", _traffic(plan)),
    ]
    width = max(len(label) for _, rows in sections for label, _ in rows)
    return "\n\n".join(
        "\n".join([heading, *(f"  {label:<{width}}  {text}".rstrip() for label, text in rows)])
        for heading, rows in sections
    )


def _title(plan: Plan) -> str:
    options = plan.options
    parts = [f"{options.ranks:,} rank{'s' * (options.ranks > 1)}"]
    if options.sharding == "fsdp":
        parts.append("fsdp" + (f" in {options.replicate} copies" if options.replicate > 1 else ""))
        parts += [f"experts over {options.expert_parallel} ranks"] * (options.expert_parallel > 1)
    elif options.ranks > 1:
        parts.append({"zero1": "ZeRO-1", "none": "nothing shared"}[options.sharding])
    dtype: str = options.dtype
    if options.compute_dtype not in (None, dtype):
        dtype += f" weights, {options.compute_dtype} products"
    parts += [options.optimizer.replace("muon", "Muon").replace("adamw", "AdamW"), dtype]
    if options.checkpointing != "none":
        parts.append(f"{options.checkpointing} checkpointing")
    return f"{plan.name}: {', '.join(parts)}"


def _parameters(plan: Plan) -> list[Row]:
    rows = []
    for name, part in plan.parameters.items():
        text = f"{short(part.total):>7}"
        text += f", {short(part.active)} active" if part.active < part.total else ""
        share = part.matrices / part.total if part.total else 0
        text += f", {100 * share:.1f} % in Muon's matrices" * (plan.options.optimizer == "muon")
        rows.append((name if name != "all" else "parameters", text))
    options = plan.options
    sequences = f"{len(options.lengths)} x {options.sequence:,} tokens on every rank"
    if options.micro_batches > 1:
        sequences = f"{options.micro_batches} times {sequences}"
    rows.append(
        ("a step", f"{sequences}, {short(plan.tokens_per_step)} tokens and {short(plan.images_per_step)} images in all")
    )
    width, height = options.image
    rows.append(("an image", f"{width}x{height} pixels, {plan.image_patches:,} patches, {plan.image_tokens:,} tokens"))
    return rows


def _memory(plan: Plan) -> list[Row]:
    memory = plan.memory
    kept = {
        "none": "kept for the backward",
        "selective": "inputs and products of blocks, and one block",
        "full": "inputs of blocks, and one block",
    }[plan.options.checkpointing]
    rows = [
        ("weights", memory.weights, _filled_up(plan)),
        ("gradients", memory.gradients, ""),
        ("optimizer state", memory.state, ""),
        ("activations", memory.activations, kept),
        ("logits", memory.logits, "of one chunk of the loss"),
        ("gathered", memory.gathered, "groups that exist whole at one moment"),
        ("buffers of the step", memory.buffers, "when activations are gone"),
    ]
    lines = [(name, f"{num_bytes(size):>8}" + (f"   {note}" if note else "")) for name, size, note in rows if size]
    return [*lines, ("peak", f"{num_bytes(memory.peak):>8}")]


def _filled_up(plan: Plan) -> str:
    """A word where sharding gives a rank much more than its share."""
    options = plan.options
    if options.sharding != "fsdp":
        return ""
    width = {"fp32": 4, "bf16": 2}[options.dtype]
    shards = options.ranks // options.replicate
    times = plan.memory.weights * shards / (width * plan.parameters["all"].total)
    if times < 1.2:
        return ""
    return f"{times:.2g} times 1/{shards:,}: more shards than rows or experts; try replicate or expert_parallel"


def _operations(plan: Plan) -> list[Row]:
    rows = [
        ("of a token", _split(plan.per_token)),
        ("of an image", _split(plan.per_image)),
        ("of a step, one rank", _split(plan.per_step)),
    ]
    if plan.recomputed:
        rows.append(("computed again", f"{_flop(plan.recomputed):>10}"))
    if plan.orthogonalisation:
        text = f"{_flop(plan.orthogonalisation):>10}, {100 * plan.orthogonalisation_share:.3g} % of the step"
        if plan.options.ranks > 1:
            text += f"; all ranks {_flop(plan.orthogonalisation_of_all)}"
        rows.append(("Newton-Schulz", text))
    return rows


def _split(operations: Operations) -> str:
    attention = operations.attention + operations.attention_backward
    return (
        f"{_flop(operations.total):>10}: forward {_flop(operations.forward)}, backward {_flop(operations.backward)}, "
        f"attention {_flop(attention)}"
    )


def _flop(number: int) -> str:
    """With the letters of the trade: 1.2 TFLOP."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {letter}FLOP"
    return f"{number} FLOP"


def _traffic(plan: Plan) -> list[Row]:
    if not plan.sent:
        return [("nothing", "")]
    rows = [(what, f"{num_bytes(size):>8}") for what, size in plan.sent.items()]
    if plan.shared_matrices:
        rows = [
            (what, text + (f"   {plan.shared_matrices:,} of them" if what.startswith("matrices") else ""))
            for what, text in rows
        ]
    return [*rows, ("together", f"{num_bytes(sum(plan.sent.values())):>8}")]
