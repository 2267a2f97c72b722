"""A plan is true: its bytes are those of real optimizers and real ranks, its parameters those of the registry."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlkit
from tests.ranks import all_of, run_ranks
from vlkit.errors import ConfigError, ImageError, SequenceTooLongError, UnknownModelError
from vlkit.models.vlm import VisionLanguageModel
from vlkit.optim import Muon
from vlkit.optim.partition import deal_flat
from vlkit.registry import model_spec
from vlkit.testing import random_batch
from vlkit.training.cost import text_cost
from vlkit.training.experts import parallel_experts
from vlkit.training.plan import _under_autocast, optimizer_groups, plan
from vlkit.training.sharding import make_mesh, shard_model
from vlkit.training.shares import flat_holders

TINY = vlkit.list_models("*-tiny")
LARGE = ["kimi-vl-a3b", "qwen2.5-vl-72b", "qwen3-vl-235b-a22b", "qwen-vl", "andesvl-4b"]
SMALL: dict[str, Any] = {"sequence": 96, "image": (24, 16), "dtype": "fp32"}


# ---- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY + LARGE)
def test_parameters_are_those_of_the_registry(name: str) -> None:
    spec = model_spec(name)
    found = plan(name).parameters
    assert (found["all"].total, found["all"].active) == (spec.num_parameters, spec.num_active_parameters)
    assert sum(found[part].total for part in ("vision", "projector", "llm")) == spec.num_parameters


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", TINY)
def test_state_is_that_of_the_optimizer(name: str, optimizer: str) -> None:
    made = make_muon(vlkit.create_model(name), optimizer)
    memory = plan(name, optimizer=optimizer, **SMALL).memory
    assert memory.state == state_bytes(made)
    trained = sum(p.numel() for group in made.param_groups for p in group["params"])
    assert memory.gradients == 4 * trained
    assert memory.weights == 4 * model_spec(name).num_parameters


def make_muon(model: VisionLanguageModel, optimizer: str = "muon", **options: Any) -> Muon:
    return Muon(optimizer_groups(model, optimizer), lr=1e-3, ns_dtype=torch.bfloat16, **options)


def state_bytes(optimizer: Muon) -> int:
    """Of what this rank has."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


# ---- ranks ----------------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that a rank sends: in a ring for gathers and scatters; the whole buffer of sums, messages and all-to-alls."""

    KINDS: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "_reduce_scatter_base_": lambda args: args[1].nbytes - args[0].nbytes,
        "_allgather_base_": lambda args: args[0].nbytes - args[1].nbytes,
        "allreduce_": lambda args: sum(tensor.nbytes for tensor in args[0]),
        "alltoall_base_": lambda args: args[1].nbytes,
        "send": lambda args: sum(tensor.nbytes for tensor in args[0]),
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = func.overloadpacket.__name__
        if func.namespace == "c10d" and kind in self.KINDS:
            self.bytes[kind] += self.KINDS[kind](args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "ranks", "partition"),
    [("kimi-vl-tiny", 3, "flat"), ("qwen3-vl-tiny", 2, "flat"), ("kimi-vl-tiny", 3, "matrix")],
)
def test_zero1_holds_and_sends_what_was_planned(name: str, ranks: int, partition: str) -> None:
    planned = plan(name, ranks=ranks, partition=partition, **SMALL)
    found = run_ranks(zero1_step, ranks, name, partition)
    assert planned.memory.state == max(state for state, _ in found)
    for _, sent in found:
        assert planned.sent["reduce-scatter of gradients"] == sent["_reduce_scatter_base_"]
        assert planned.sent["all-gather of parameters"] == sent["_allgather_base_"]
    assert planned.sent.get("matrices that several ranks share", 0) == max(sent["send"] for _, sent in found)


def zero1_step(rank: int, name: str, partition: Any) -> tuple[int, Counter[str]]:
    torch.manual_seed(0)
    model = vlkit.create_model(name)
    optimizer = make_muon(model, process_group=dist.group.WORLD, grad_sync="reduce_scatter", partition=partition)
    loss = model(random_batch(model, seed=rank)).loss
    assert loss is not None
    loss.backward()
    with Sent() as sent:
        optimizer.step()
    return state_bytes(optimizer), sent.bytes


MESHES = [(1, 1), (2, 1), (1, 2)]


@pytest.fixture(scope="module")
def fsdp_steps() -> list[list[Any]]:
    """A step of four ranks, in every arrangement."""
    works = [(fsdp_step, ("kimi-vl-tiny", *each)) for each in MESHES]
    return [list(results) for results in zip(*run_ranks(all_of, 4, works), strict=True)]


@pytest.mark.parametrize(("replicate", "expert_parallel"), MESHES)
def test_fsdp_holds_and_sends_what_was_planned(
    replicate: int, expert_parallel: int, fsdp_steps: list[list[Any]]
) -> None:
    name, ranks, tokens = "kimi-vl-tiny", 4, 26
    planned = plan(
        name,
        ranks=ranks,
        sharding="fsdp",
        replicate=replicate,
        expert_parallel=expert_parallel,
        sequence=tokens,
        image=(24, 16),
        dtype="fp32",
    )
    found = fsdp_steps[MESHES.index((replicate, expert_parallel))]
    assert planned.memory.weights == max(weights for weights, *_ in found)
    assert planned.memory.gradients == max(gradients for _, gradients, *_ in found)
    assert planned.memory.state == max(state for *_, state, _ in found)
    sent = [counted for *_, counted in found]
    # Five experts over two ranks: the rank with three is the one that is planned for.
    assert planned.sent["all-gather of weights"] == max(each["_allgather_base_"] for each in sent)
    assert planned.sent["reduce-scatter of gradients"] == max(each["_reduce_scatter_base_"] for each in sent)
    assert (
        planned.sent.get("all-reduce of gradients between copies", 0)
        == sent[0]["allreduce_"] * 2 * (replicate - 1) / replicate
    )
    assert planned.sent["matrices that several ranks share"] == max(each["send"] for each in sent)
    # Rows go where the router sends them, so only their sum is known; the counts before them, 8 bytes an expert, are left out.
    rows = sum(each["alltoall_base_"] - 8 * 5 * (expert_parallel > 1) for each in sent)
    assert planned.sent.get("all-to-all of tokens", 0) * ranks * 2 == rows


def fsdp_step(rank: int, name: str, replicate: int, expert_parallel: int) -> tuple[int, int, int, Counter[str]]:
    torch.manual_seed(0)
    mesh = make_mesh(replicate=replicate, expert_parallel=expert_parallel)
    model = shard_model(vlkit.create_model(name), mesh)
    optimizer = make_muon(model)
    with Sent() as sent:
        loss = model(random_batch(model, ((20, [(2, 3)]),), seed=rank)).loss
        loss.backward()
    with Sent() as exchanged:
        optimizer.step()
    sent.bytes["send"] = exchanged.bytes["send"]
    weights = memory_of([p.to_local() for p in model.parameters()])
    gradients = memory_of([p.grad.to_local() for p in model.parameters() if p.grad is not None])
    return weights, gradients, state_bytes(optimizer), sent.bytes


def memory_of(tensors: list[torch.Tensor]) -> int:
    """Bytes, with what fills shards up; the gradients of a group are one memory."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    storages.pop(0, None)
    return sum(storages.values())


def test_spread_experts_keep_what_was_planned() -> None:
    """To 2 %: rows that fill up the blocks of experts differ with the tokens that come."""
    options = {"ranks": 2, "sharding": "fsdp", "sequence": 400, "images_per_sequence": 0, "dtype": "fp32"}
    together, spread = (plan("kimi-vl-tiny", expert_parallel=each, **options).memory for each in (1, 2))
    found = run_ranks(kept_by_experts, 2)
    assert spread.activations - together.activations == pytest.approx(sum(found) / 2, rel=0.02)


def kept_by_experts(rank: int) -> int:
    """Bytes that autograd saves more where experts lie on both ranks."""
    kept = []
    for spread in (False, True):
        torch.manual_seed(0)
        model = vlkit.create_model("kimi-vl-tiny")
        if spread:
            parallel_experts(model, make_mesh(expert_parallel=2)["expert"])
        batch = random_batch(model, ((400, []),), seed=rank)
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, torch.UntypedStorage] = saved) -> torch.Tensor:
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            saved[own.untyped_storage()._cdata] = own.untyped_storage()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model.llm(batch.ids.with_tokens(model.llm.embed(batch.ids.tokens)))
        for p in model.parameters():
            own = p.to_local() if isinstance(p, DTensor) else p
            saved.pop(own.untyped_storage()._cdata, None)
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    return kept[1] - kept[0]


# ---- what is planned ------------------------------------------------------------------------------------------------


def test_ranks_share_the_state() -> None:
    alone, eight = plan("kimi-vl-a3b"), plan("kimi-vl-a3b", ranks=8)
    assert eight.memory.state == pytest.approx(alone.memory.state / 8, rel=1e-4)
    adamw = plan("kimi-vl-a3b", ranks=8, optimizer="adamw")
    assert adamw.memory.state == pytest.approx(8 * alone.parameters["all"].total / 8, rel=1e-4)


def test_shards_beyond_the_experts_are_filled_up() -> None:
    """64 stacked experts cut along the stack: 1,024 shards hold 16 times as much together."""
    few, many = (plan("kimi-vl-a3b", ranks=ranks, sharding="fsdp") for ranks in (64, 1024))
    assert 13 < many.memory.weights * 1024 / (few.memory.weights * 64) < 16
    copies = plan("kimi-vl-a3b", ranks=1024, sharding="fsdp", replicate=16)
    assert copies.memory.weights == few.memory.weights
    assert "14 times 1/1,024" in str(many)


def test_a_step_is_its_tokens_and_images() -> None:
    planned = plan("kimi-vl-a3b", ranks=4, sequence=4096, micro_batch=10_000, micro_batches=3, images_per_sequence=2)
    assert planned.options.lengths == (4096, 4096)
    assert planned.tokens_per_step == 4 * 3 * 2 * 4096
    assert planned.images_per_step == 4 * 3 * 2 * 2
    assert planned.per_step.total == pytest.approx(
        6 * 4096 * planned.per_token.total + 12 * planned.per_image.total, rel=1e-6
    )


def test_products_of_a_token_are_two_per_active_parameter() -> None:
    """The embedding is looked up; fp32 copies and norms multiply no matrices."""
    model = vlkit.create_model("kimi-vl-a3b", device="meta")
    planned = plan("kimi-vl-a3b")
    matrices = sum(p.numel() for p in model.llm.parameters() if p.ndim > 1) - model.llm.inactive_parameters()
    assert planned.per_token.forward == 2 * (matrices - model.llm.embedding.weight.numel())
    assert planned.per_token.backward == 2 * planned.per_token.forward


def test_without_images_a_rank_runs_the_blank_one() -> None:
    planned = plan("kimi-vl-tiny", sequence=64, images_per_sequence=0)
    assert planned.images_per_step == 0
    assert planned.per_step.forward > 64 * planned.per_token.forward


def test_checkpointing_trades_memory_for_operations() -> None:
    none, selective, full = (plan("kimi-vl-a3b", checkpointing=kind) for kind in ("none", "selective", "full"))
    assert full.memory.activations < selective.memory.activations < none.memory.activations
    assert none.recomputed == 0 < full.recomputed < full.per_step.total / 3


def test_mixed_precision_gathers_and_computes_in_the_narrow_type() -> None:
    options = {"ranks": 8, "sharding": "fsdp"}
    narrow, wide = plan("kimi-vl-a3b", **options), plan("kimi-vl-a3b", dtype="fp32", **options)
    mixed = plan("kimi-vl-a3b", dtype="fp32", compute_dtype="bf16", **options)
    assert mixed.memory.weights == wide.memory.weights == 2 * narrow.memory.weights
    assert mixed.memory.activations == narrow.memory.activations < wide.memory.activations
    assert mixed.sent == narrow.sent


@pytest.mark.parametrize("name", ["kimi-vl-tiny", "qwen2.5-vl-tiny"])
def test_autocast_keeps_what_was_planned(name: str) -> None:
    """An estimate, and not below what a decoder keeps: 2 to 11 % above it."""
    model, tokens = vlkit.create_model(name), 400
    batch = random_batch(model, ((tokens, []),), seed=0)
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda tensor: tensor):
        model.llm(batch.ids.with_tokens(model.llm.embed(batch.ids.tokens)))
    for p in model.parameters():
        saved.pop(p.untyped_storage()._cdata, None)
    found = sum(storage.nbytes() for storage in saved.values())
    meta = {d: vlkit.create_model(name, device="meta", dtype=d) for d in (torch.bfloat16, torch.float32)}
    narrow, wide = (text_cost(m, [batch.ids.layout.num_tokens]) for m in meta.values())
    blocks = [p.numel() for p in model.llm.blocks.parameters() if p.ndim > 1]
    planned = _under_autocast(meta[torch.float32], narrow, wide).kept
    rest = sum(p.numel() for p in model.parameters() if p.ndim > 1) - sum(blocks) - model.llm.embedding.weight.numel()
    assert found < planned - 2 * rest < 1.12 * found


def test_the_plain_mixed_run_can_be_planned() -> None:
    """fp32 weights under autocast, whole on every rank."""
    options = {"ranks": 2, "sequence": 64, "image": (16, 16), "dtype": "fp32"}
    wide, mixed = plan("kimi-vl-tiny", **options), plan("kimi-vl-tiny", compute_dtype="bf16", **options)
    assert mixed.memory.weights == wide.memory.weights
    assert mixed.sent == wide.sent
    assert mixed.per_step == wide.per_step
    assert "fp32 weights, bf16 products" in str(mixed)


def test_buffers_are_what_is_in_transit() -> None:
    """Averaged gradients, half of all on two ranks, and those of both ranks; never the 64 MiB that a large model takes."""
    planned = plan("kimi-vl-tiny", sequence=64, image=(16, 16), ranks=2, dtype="fp32")
    gradients = planned.memory.gradients
    assert 0.5 * gradients < planned.memory.buffers < 1.51 * gradients
    assert "Muon's matrices" not in str(plan("kimi-vl-tiny", sequence=64, image=(16, 16), optimizer="adamw"))


@pytest.mark.parametrize("sizes", [[0, 5, 3, 0, 17], [1], [7, 7, 7]], ids=str)
def test_ranks_with_nothing_are_left_out(sizes: list[int]) -> None:
    for ranks in (1, 2, 3, 40):
        dealt = [{rank: own for rank, own in enumerate(each) if own} for each in deal_flat(sizes, ranks)]
        assert flat_holders(sizes, ranks) == dealt


def test_a_saved_model_and_a_composition_can_be_planned(tmp_path: Path) -> None:
    model = vlkit.compose(vision="moonvit-tiny", llm="qwen3-tiny")
    model.save_pretrained(tmp_path)
    planned, composed = plan(tmp_path, sequence=128, image=(16, 16)), plan(model.config, sequence=128, image=(16, 16))
    assert planned.memory == composed.memory
    assert planned.parameters["all"].total == model.num_parameters()


def test_a_plan_is_json() -> None:
    planned = plan("kimi-vl-tiny", sequence=64, image=(16, 16))
    values = json.loads(json.dumps(planned.to_dict()))
    assert values["memory"]["peak"] == planned.memory.peak
    assert values["per_token"]["total"] == planned.per_token.total
    assert values["options"]["sequence"] == 64


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sequence": 9000}, SequenceTooLongError, "sequence=4096 or less"),
        ({"sequence": 64, "images_per_sequence": 9}, SequenceTooLongError, "9 images of 70 tokens do not fit"),
        ({"image": (1, 10_000)}, ImageError, "aspect ratio"),
        ({"expert_parallel": 2, "ranks": 2}, ConfigError, "expert_parallel needs sharding='fsdp'"),
        ({"compute_dtype": "fp32"}, ConfigError, "autocast never widens; leave compute_dtype away"),
        ({"ranks": 1_000_000, "sharding": "fsdp"}, ConfigError, "at most 131,072 ranks, found 1,000,000"),
        ({"ranks": 10_000, "partition": "matrix"}, ConfigError, "at most 4,096 ranks with partition='matrix'"),
        ({"expert_parallel": 8, "ranks": 8, "sharding": "fsdp"}, ConfigError, "over 5 ranks"),
        ({"replicate": 3, "ranks": 8, "sharding": "fsdp"}, ConfigError, "must divide the number of ranks"),
        ({"sequence": 128, "micro_batch": 100}, ConfigError, "holds no sequence of 128"),
        ({"rank": 8}, ConfigError, "did you mean 'ranks'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        plan("kimi-vl-tiny", **options)


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(ConfigError, match="qwen3-vl-tiny has no experts"):
        plan("qwen3-vl-tiny", ranks=2, sharding="fsdp", expert_parallel=2)


def test_an_unknown_name_has_neighbours() -> None:
    with pytest.raises(UnknownModelError, match="kimi-vl-tiny"):
        plan("kimi-vl-tyni")


# ---- as many ranks as nobody has here -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "replicate", "expert_parallel"), [pytest.param(1024, 1, 1, marks=pytest.mark.slow), (1024, 16, 8)]
)
def test_the_real_model_lies_on_many_ranks_as_planned(ranks: int, replicate: int, expert_parallel: int) -> None:
    """Kimi-VL on meta, sharded by FSDP2 for the first of so many ranks, of which the others do not exist."""
    options = {"ranks": ranks, "replicate": replicate, "expert_parallel": expert_parallel}
    planned = plan("kimi-vl-a3b", sharding="fsdp", dtype="fp32", **options)
    ((weights, state),) = run_ranks(first_of_many, 1, *options.values(), timeout=300)
    assert planned.memory.weights == weights
    assert planned.memory.state == state


def first_of_many(_: int, ranks: int, replicate: int, expert_parallel: int) -> tuple[int, int]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = make_mesh(replicate=replicate, expert_parallel=expert_parallel, device_type="cpu")
    model = shard_model(vlkit.create_model("kimi-vl-a3b", device="meta"), mesh)
    weights = sum(4 * local(p) for p in model.parameters())
    state = 0
    for group in optimizer_groups(model, "muon"):
        muon = group["algorithm"] == "muon"
        state += sum(4 * local(p) if muon else 8 * local(p) + 4 for p in group["params"])
    return weights, state


def local(parameter: Any) -> int:
    return int(parameter.to_local().numel())
