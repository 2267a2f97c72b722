"""Key maps: one table, two directions, and a report that a person can act on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlkit.errors import ConfigError, KeyMismatchError
from vlkit.hub.keymap import KeyMap, Step, choose_keymap, collapse, drop, rename, reshape, split, stack


def numbers(*shape: int) -> Tensor:
    """Distinct values, so that a swapped or shifted block shows."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# Rules.


def test_rename_keeps_the_numbers_and_fills_the_fields() -> None:
    keys = KeyMap(rename("h.{layer}.ln.{kind}", "blocks.{layer}.norm.{kind}"))
    weight, bias = numbers(3), numbers(3) + 9

    found = keys.to_ours({"h.0.ln.weight": weight, "h.12.ln.bias": bias})

    assert_same(found, {"blocks.0.norm.weight": weight, "blocks.12.norm.bias": bias})


def test_a_mapping_of_choices_translates_and_admits_nothing_else() -> None:
    keys = KeyMap(rename("{layer}.{norm}.w", "{layer}.{norm}.w", norm={"norm0": "norm1", "norm1": "norm2"}))
    first, second = numbers(2), numbers(2) + 5

    ours = keys.to_ours({"0.norm0.w": first, "0.norm1.w": second})

    assert_same(ours, {"0.norm1.w": first, "0.norm2.w": second})
    assert_same(keys.to_theirs(ours), {"0.norm0.w": first, "0.norm1.w": second})
    with pytest.raises(KeyMismatchError, match=r"0\.norm2\.w"):
        keys.to_ours({"0.norm2.w": first})


def test_split_cuts_rows_in_the_order_of_the_parts() -> None:
    keys = KeyMap(split("wqkv.{kind}", "attn.{part}.{kind}", part=("q", "k", "v")))
    fused, bias = numbers(9, 2), numbers(9)

    ours = keys.to_ours({"wqkv.weight": fused, "wqkv.bias": bias})

    assert torch.equal(ours["attn.k.weight"], fused[3:6])
    assert torch.equal(ours["attn.v.bias"], bias[6:])
    assert_same(keys.to_theirs(ours), {"wqkv.weight": fused, "wqkv.bias": bias})


def test_split_takes_unequal_proportions() -> None:
    keys = KeyMap(split("qkv", "{part}", part=("q", "k", "v"), sizes=(4, 1, 1)))
    fused = numbers(12, 3)

    ours = keys.to_ours({"qkv": fused})

    assert [len(ours[part]) for part in "qkv"] == [8, 2, 2]
    assert_same(keys.to_theirs(ours), {"qkv": fused})


def test_split_takes_parts_that_repeat_per_head() -> None:
    """Two heads of (q, k, v) with two rows each: rows 0-1 q of head 0, 2-3 k, 4-5 v, 6-7 q of head 1, ..."""
    keys = KeyMap(split("qkv", "{part}", part=("q", "k", "v"), groups=2))
    fused = numbers(12, 3)

    ours = keys.to_ours({"qkv": fused})

    assert torch.equal(ours["k"], fused[[2, 3, 8, 9]])
    assert_same(keys.to_theirs(ours), {"qkv": fused})


def test_stack_orders_rows_by_number_not_by_text() -> None:
    keys = KeyMap(stack("experts.{expert}.up.weight", "experts.up"))
    state = {f"experts.{e}.up.weight": torch.full((2, 3), float(e)) for e in sorted(range(12), key=str)}

    ours = keys.to_ours(state)

    assert ours["experts.up"][:, 0, 0].tolist() == list(range(12))
    assert_same(keys.to_theirs(ours), state)


def test_fused_and_stacked_experts_are_split_along_another_axis() -> None:
    keys = KeyMap(split("experts.gate_up", "experts.{part}", part=("gate", "up"), dim=1))
    fused = numbers(3, 10, 4)

    ours = keys.to_ours({"experts.gate_up": fused})

    assert torch.equal(ours["experts.up"], fused[:, 5:])
    assert_same(keys.to_theirs(ours), {"experts.gate_up": fused})


def test_fused_experts_that_are_stored_transposed_are_turned() -> None:
    def turn(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2)

    keys = KeyMap(split("gate_up", "{part}", part=("gate", "up"), dim=2, to_ours=turn, to_theirs=turn))
    fused = numbers(3, 4, 10)

    ours = keys.to_ours({"gate_up": fused})

    assert torch.equal(ours["up"], fused[:, :, 5:].transpose(1, 2))
    assert_same(keys.to_theirs(ours), {"gate_up": fused})


def test_experts_that_are_fused_one_by_one_are_split_and_stacked() -> None:
    keys = KeyMap(split("{expert}.gate_up", "{part}", part=("gate", "up"), over="expert"))
    state = {f"{e}.gate_up": numbers(6, 2) + 100 * e for e in range(3)}

    ours = keys.to_ours(state)

    assert ours["gate"].shape == (3, 3, 2)
    assert torch.equal(ours["up"][2], state["2.gate_up"][3:])
    assert_same(keys.to_theirs(ours), state)


def test_reshape_applies_its_functions() -> None:
    keys = KeyMap(reshape("proj", "proj", lambda t: t.flatten(1), lambda t: t.unflatten(1, (3, 2, 2))))
    kernel = numbers(5, 3, 2, 2)

    ours = keys.to_ours({"proj": kernel})

    assert ours["proj"].shape == (5, 12)
    assert_same(keys.to_theirs(ours), {"proj": kernel})


def test_drop_ignores_on_load_and_never_writes() -> None:
    keys = KeyMap(rename("a", "a"), drop("{layer}.inv_freq"))

    ours = keys.to_ours({"a": numbers(1), "3.inv_freq": numbers(2)})

    assert ours.keys() == {"a"}
    assert keys.to_theirs(ours).keys() == {"a"}


def test_an_optional_tensor_is_ignored_only_if_the_model_has_no_place_for_it() -> None:
    keys = KeyMap(rename("embed", "embed"), rename("head", "head", optional=True))
    theirs = {"embed": (5, 2), "head": (5, 2)}

    assert [step.target for step in keys.plan_load(theirs, {"embed": (5, 2)})] == ["embed"]
    assert [step.target for step in keys.plan_load(theirs, theirs)] == ["embed", "head"]
    with pytest.raises(KeyMismatchError, match="head <- head"):
        keys.plan_load({"embed": (5, 2)}, theirs)  # an untied head is never invented


def test_a_read_only_spelling_is_loaded_and_not_written() -> None:
    keys = KeyMap(rename("model.{name}", "{name}")) + KeyMap(rename("old.{name}", "{name}")).read_only()

    ours = keys.to_ours({"old.a": numbers(2)})

    assert keys.to_theirs(ours).keys() == {"model.a"}
    with pytest.raises(KeyMismatchError, match=r"a would be filled by model\.a and by old\.a"):
        keys.to_ours({"model.a": numbers(2), "old.a": numbers(2)})


def test_a_path_field_keeps_dotted_names() -> None:
    keys = KeyMap(rename("trunk.{path}", "vision.{path}"))

    assert keys.to_ours({"trunk.blocks.0.w": numbers(1)}).keys() == {"vision.blocks.0.w"}


def test_mounting_puts_prefixes_on_both_sides_and_plus_joins() -> None:
    part = KeyMap(split("w.{layer}", "{part}.{layer}", part=("q", "k")), drop("x"))
    whole = part.mounted(theirs="tower.", ours="vision.") + KeyMap(rename("head", "head"))
    state = {"tower.w.0": numbers(4), "head": numbers(1)}

    ours = whole.to_ours(state | {"tower.x": numbers(1)})

    assert ours.keys() == {"vision.q.0", "vision.k.0", "head"}
    assert_same(whole.to_theirs(ours), state)


def test_field_words_are_whole_and_names_have_one_spelling() -> None:
    keys = KeyMap(rename("l.{layer}.{kind}", "b.{layer}.{kind}"))

    for name in ("l.01.weight", "l.-1.weight", "l.x.weight", "l.0.a.b", "l.0.", "xl.0.weight", "l.0.weight\n", "l0.w"):
        with pytest.raises(KeyMismatchError):
            keys.to_ours({name: numbers(1)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: rename("a.{layer}", "a"),
        lambda: rename("a", "a.{layer}"),
        lambda: rename("{x}.{x}", "{x}.b"),
        lambda: rename("a.{}", "a.{}"),
        lambda: rename("{x}", "{x}", x={"a": "c", "b": "c"}),
        lambda: split("w", "w.{part}", part=("q",)),
        lambda: split("w", "w", part=("q", "k")),
        lambda: split("w", "w.{part}", part=("q", "k"), sizes=(1, 2, 3)),
        lambda: split("w", "w.{part}", part="qk"),
        lambda: stack("e.{expert}.{layer}", "e"),
        lambda: split("w", "w.{part}", part=("q", "k"), to_ours=lambda t: t),
        lambda: KeyMap(rename("a", "a")).mounted(theirs="{x}."),
    ],
)
def test_rules_that_cannot_be_inverted_are_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


def test_a_misspelt_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="knd"):
        rename("a.{kind}", "b.{kind}", knd=("weight", "bias"))


# Reports.

KEYS = KeyMap(
    rename("l.{layer}.norm.{kind}", "blocks.{layer}.norm.{kind}"),
    split("l.{layer}.qkv", "blocks.{layer}.{part}", part=("q", "k", "v")),
    stack("l.{layer}.e.{expert}.up", "blocks.{layer}.up"),
    rename("embed", "embedding.weight"),
)


def published(num_layers: int = 3, num_experts: int = 4, vocab: int = 7) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"embed": (vocab, 2)}
    for layer in range(num_layers):
        out |= {f"l.{layer}.norm.{kind}": (2,) for kind in ("weight", "bias")}
        out[f"l.{layer}.qkv"] = (6, 2)
        out |= {f"l.{layer}.e.{e}.up": (5, 2) for e in range(num_experts)}
    return out


def wanted(num_layers: int = 3, num_experts: int = 4, vocab: int = 7) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab, 2)}
    for layer in range(num_layers):
        out |= {f"blocks.{layer}.norm.{kind}": (2,) for kind in ("weight", "bias")}
        out |= {f"blocks.{layer}.{part}": (2, 2) for part in "qkv"}
        out[f"blocks.{layer}.up"] = (num_experts, 5, 2)
    return out


def report_of(theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> str:
    with pytest.raises(KeyMismatchError) as caught:
        KEYS.plan_load(theirs, ours)
    return str(caught.value)


def test_a_plan_covers_every_parameter_with_its_shape_and_sources() -> None:
    steps = KEYS.plan_load(published(), wanted())

    assert {step.target: step.shape for step in steps} == wanted()
    by_target = {step.target: step for step in steps}
    assert by_target["blocks.2.up"].sources == tuple(f"l.2.e.{e}.up" for e in range(4))
    assert by_target["blocks.1.k"].sources == ("l.1.qkv",)
    assert by_target["blocks.1.k"].part == 1


def test_missing_layers_are_collapsed_with_the_names_that_would_fill_them() -> None:
    text = report_of(published(num_layers=1), wanted())

    assert "blocks.{1..2}.q (2) <- l.N.qkv" in text
    assert "fewer layers" in text


def test_unexpected_layers_are_collapsed() -> None:
    text = report_of(published(num_layers=9), wanted(num_layers=2))

    assert "l.{2..8}.e.{0..3}.up (28)" in text
    assert "more layers" in text


def test_unknown_names_are_listed_beside_what_is_missing() -> None:
    theirs = published()
    theirs["l.0.Qkv"] = theirs.pop("l.0.qkv")

    text = report_of(theirs, wanted())

    assert "l.0.Qkv" in text
    assert "blocks.0.k <- l.0.qkv" in text


def test_a_hole_in_a_stack_names_the_missing_rows() -> None:
    theirs = published()
    del theirs["l.1.e.1.up"], theirs["l.1.e.2.up"]

    assert "blocks.1.up <- l.1.e.{1..2}.up (2)" in report_of(theirs, wanted())


def test_an_absurd_number_of_rows_is_reported_in_no_time() -> None:
    """The report names the first; it never lists what a hostile config asks for."""
    keys = KeyMap(stack("e.{expert}", "experts"))

    with pytest.raises(KeyMismatchError, match=r"experts <- e\.\{2\.\.1001\} \(1000\), and on to row 1099511627775"):
        keys.plan_load({"e.0": (2,), "e.1": (2,)}, {"experts": (2**40, 2)})


def test_more_experts_than_the_model_has_are_unexpected() -> None:
    assert "l.{0..2}.e.{4..5}.up (6)" in report_of(published(num_experts=6), wanted())


def test_a_resized_vocabulary_is_recognised() -> None:
    text = report_of(published(vocab=9), wanted(vocab=7))

    assert "[9, 2] -> [7, 2]" in text
    assert "vocab_size=9" in text


def test_transposed_tensors_are_recognised() -> None:
    theirs = published()
    theirs |= {name: (2, 5) for name in theirs if ".e." in name}

    assert "transposed" in report_of(theirs, wanted())


def test_rows_that_cannot_be_split_give_both_numbers() -> None:
    text = report_of(published() | {"l.0.qkv": (7, 2)}, wanted())

    assert "axis 0 has length 7, which is not a multiple of 3" in text


def test_a_wrapped_state_dict_is_recognised() -> None:
    text = report_of({f"module.{name}": shape for name, shape in published().items()}, wanted())

    assert "every name begins with 'module.'" in text


def test_another_family_is_recognised() -> None:
    assert "another family" in report_of({"h.0.attn": (2, 2)}, wanted())


def test_a_fused_tensor_with_a_part_that_the_model_lacks_is_refused() -> None:
    ours = wanted()
    del ours["blocks.1.k"]

    assert "l.1.qkv also makes blocks.1.k, which the model does not have" in report_of(published(), ours)


def test_two_rules_for_one_name_are_refused_both_ways() -> None:
    keys = KeyMap(rename("a.{x}", "b.{x}"), rename("a.w", "c.w"), rename("d.{x}", "b.w{x}"))

    with pytest.raises(KeyMismatchError, match=r"a\.w is matched by a\.\{x\} <-> b\.\{x\} and by a\.w <-> c\.w"):
        keys.to_ours({"a.w": numbers(1)})
    with pytest.raises(KeyMismatchError, match=r"b\.w1 is matched by"):
        keys.to_theirs({"b.w1": numbers(1)})


def test_saving_refuses_a_parameter_without_a_name_and_a_part_without_the_others() -> None:
    with pytest.raises(KeyMismatchError, match=r"adapter has no published name"):
        KEYS.plan_save(wanted() | {"adapter": (1,)})
    incomplete = wanted()
    del incomplete["blocks.1.k"]
    with pytest.raises(KeyMismatchError, match=r"l\.1\.qkv cannot be written without blocks\.1\.k"):
        KEYS.plan_save(incomplete)


def test_saving_refuses_parts_of_unequal_size() -> None:
    with pytest.raises(KeyMismatchError, match=r"l\.0\.qkv cannot be made from .*blocks\.0\.k \[3, 2\]"):
        KEYS.plan_save(wanted() | {"blocks.0.k": (3, 2)})


def test_a_plan_to_save_covers_every_published_tensor() -> None:
    assert {step.target: step.shape for step in KEYS.plan_save(wanted())} == published()


def test_not_strict_still_refuses_shapes() -> None:
    partial = published(num_layers=2)
    assert len(KEYS.plan_load(partial, wanted(), strict=False)) == len(wanted(num_layers=2))
    with pytest.raises(KeyMismatchError, match="another shape"):
        KEYS.plan_load(partial | {"l.0.qkv": (9, 2)}, wanted(), strict=False)


def turn(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


PLAIN = KeyMap(rename("w", "w"), rename("b", "b"))
TURNED = KeyMap(reshape("w", "w", turn, turn), rename("b", "b"))


def test_the_layout_that_fits_is_chosen_and_the_nearest_one_reported() -> None:
    ours = {"w": (2, 3, 5), "b": (2,)}

    assert choose_keymap([PLAIN, TURNED], {"w": (2, 5, 3), "b": (2,)}, ours).index == 1
    assert choose_keymap([PLAIN, TURNED], {"w": (2, 3, 5), "b": (2,)}, ours).index == 0
    with pytest.raises(KeyMismatchError, match=r"layout 1 of 2 is the nearest.*\n.*\n.*\[4\] -> \[2\]"):
        choose_keymap([PLAIN, TURNED], {"w": (2, 5, 3), "b": (4,)}, ours)


def test_not_strict_takes_the_nearest_layout() -> None:
    ours = {"w": (2, 3, 5), "b": (2,)}

    chosen = choose_keymap([PLAIN, TURNED], {"w": (2, 5, 3)}, ours, strict=False)

    assert chosen.index == 1
    assert chosen.report.missing == {"b": "b"}
    with pytest.raises(KeyMismatchError, match="another shape"):
        choose_keymap([PLAIN, TURNED], {"w": (2, 4, 4)}, ours, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_square_matrices_that_fit_two_layouts_are_refused_unless_one_is_named(strict: bool) -> None:
    ours = {"w": (2, 3, 3), "b": (2,)}
    theirs = ours if strict else {"w": (2, 3, 3)}

    with pytest.raises(
        KeyMismatchError, match=r"layout 0 and layout 1, which read w differently.*pass layout=0 or layout=1"
    ):
        choose_keymap([PLAIN, TURNED], theirs, ours, strict=strict)

    assert choose_keymap([PLAIN, TURNED], theirs, ours, strict=strict, layout=1).index == 1
    assert choose_keymap([PLAIN, TURNED], theirs, ours, strict=strict, written=1).index == 1
    with pytest.raises(KeyMismatchError, match="layout=0 or layout=1"):
        choose_keymap([PLAIN, TURNED], theirs, ours, strict=strict, written=7)


@pytest.mark.parametrize("layout", [2, -1, True, "0"])
def test_a_layout_that_there_is_not_is_refused(layout: Any) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        choose_keymap([PLAIN, TURNED], {}, {}, layout=layout)


def test_what_the_files_claim_does_not_overrule_their_shapes() -> None:
    ours = {"w": (2, 3, 5), "b": (2,)}

    assert choose_keymap([PLAIN, TURNED], ours, ours, written=1).index == 0


def test_two_maps_that_read_the_same_numbers_are_no_ambiguity() -> None:
    """Whether their functions are the same ones or only do the same is asked of numbers."""
    ours = {"q": (2, 3), "k": (2, 3)}
    halves = KeyMap(split("qk", "{part}", part=("q", "k")))
    again = KeyMap(split("qk", "{part}", part=("q", "k"), to_ours=lambda t: t.clone(), to_theirs=lambda t: t))
    swapped = KeyMap(split("qk", "{part}", part=("k", "q")))

    assert choose_keymap([halves, again], {"qk": (4, 3)}, ours).index == 0
    with pytest.raises(KeyMismatchError, match="read q, k differently"):
        choose_keymap([halves, again, swapped], {"qk": (4, 3)}, ours)


def test_another_name_for_the_same_parameter_is_a_difference() -> None:
    one, two = KeyMap(rename("a", "w"), drop("b")), KeyMap(rename("b", "w"), drop("a"))

    with pytest.raises(KeyMismatchError, match="read w differently"):
        choose_keymap([one, two], {"a": (3,), "b": (3,)}, {"w": (3,)})


@pytest.mark.parametrize("first", ["l.01.weight", "l.1.weight", "l.1.0"])
def test_a_name_is_judged_by_itself_whatever_was_asked_before(first: str) -> None:
    """Names that are equal but for their numbers share a look-up of rules, never a verdict."""
    keys = KeyMap(rename("l.{layer}.weight", "w.{layer}"), rename("l.1.{kind}", "one.{kind}", kind=("0", "bias")))
    keys.compare({first: (1,)})

    assert keys.compare({"l.2.weight": (1,)})[1].num_problems == 0
    assert keys.compare({"l.1.0": (1,)})[1].num_problems == 0
    assert keys.compare({"l.2.0": (1,)})[1].unexpected == ["l.2.0"]
    assert keys.compare({"l.02.weight": (1,)})[1].unexpected == ["l.02.weight"]


def test_names_are_collapsed_with_gaps_shown() -> None:
    names = [f"a.{i}.b{i}" for i in range(1)] + [f"x.{i}.w" for i in (0, 1, 2, 5, 9)]

    assert collapse(names) == ["a.0.b0", "x.{0..2,5,9}.w (5)"]


def test_pieces_hold_one_source_at_a_time() -> None:
    """A stack is filled row by row; no step asks for two sources before the first is used."""
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return numbers(5, 2)

    step: Step = next(step for step in KEYS.plan_load(published(), wanted()) if step.target == "blocks.0.up")
    seen = [(row, len(reads)) for row, _ in step.pieces(read)]

    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]


# Any map made of these rules is a bijection.


@st.composite
def maps_with_states(draw: st.DrawFn) -> tuple[KeyMap, dict[str, Tensor]]:
    """A random map over distinct prefixes, and a published state that it covers."""
    rules, state, count = [], {}, 0
    size = st.integers(1, 4)

    def fresh(*shape: int) -> Tensor:
        nonlocal count
        total = torch.Size(shape).numel()
        count += total
        return torch.arange(count - total, count, dtype=torch.float32).reshape(shape)

    for index in range(draw(st.integers(1, 5))):
        theirs, ours = f"t{index}", f"o{index}"
        layers = draw(st.lists(st.integers(0, 120), min_size=1, max_size=3, unique=True))
        kind = draw(st.sampled_from(["rename", "split", "stack", "fused", "both", "reshape"]))
        rows, width, repeat = draw(size), draw(size), draw(size)
        parts = tuple(draw(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=4, unique=True)))
        sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=len(parts), max_size=len(parts))))
        if kind == "rename":
            rules.append(rename(f"{theirs}.{{layer}}.w", f"{ours}.{{layer}}.w"))
            state |= {f"{theirs}.{n}.w": fresh(rows, width) for n in layers}
        elif kind == "split":
            rule = split(f"{theirs}.{{layer}}", f"{ours}.{{p}}.{{layer}}", p=parts, sizes=sizes, groups=repeat)
            rules.append(rule)
            state |= {f"{theirs}.{n}": fresh(sum(sizes) * repeat * rows, width) for n in layers}
        elif kind == "stack":
            rules.append(stack(f"{theirs}.{{layer}}.{{expert}}", f"{ours}.{{layer}}"))
            state |= {f"{theirs}.{n}.{e}": fresh(rows, width) for n in layers for e in range(repeat)}
        elif kind == "fused":
            rules.append(split(f"{theirs}.{{layer}}", f"{ours}.{{layer}}.{{p}}", p=parts, sizes=sizes, dim=-1))
            state |= {f"{theirs}.{n}": fresh(repeat, rows, sum(sizes) * width) for n in layers}
        elif kind == "both":
            rules.append(split(f"{theirs}.{{layer}}.{{expert}}", f"{ours}.{{layer}}.{{p}}", p=parts, over="expert"))
            state |= {f"{theirs}.{n}.{e}": fresh(len(parts) * rows, width) for n in layers for e in range(repeat)}
        else:
            to_ours, to_theirs = (lambda t: t.flatten(1)), (lambda t, w=width: t.unflatten(1, (-1, w)))
            rules.append(reshape(f"{theirs}.{{layer}}", f"{ours}.{{layer}}", to_ours, to_theirs))
            state |= {f"{theirs}.{n}": fresh(rows, repeat, width) for n in layers}
    return KeyMap(*rules), state


@settings(max_examples=60, deadline=None)
@given(maps_with_states())
def test_any_map_round_trips_bit_for_bit(drawn: tuple[KeyMap, dict[str, Tensor]]) -> None:
    keys, theirs = drawn
    keys = keys.mounted(theirs="model.", ours="llm.")
    theirs = {f"model.{name}": tensor for name, tensor in theirs.items()}

    ours = keys.to_ours(theirs)

    assert_same(keys.to_theirs(ours), theirs)
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in theirs.values())
    # The plans agree with what is made, and need no tensors.
    assert {s.target: s.shape for s in keys.plan_load(shapes(theirs), shapes(ours))} == shapes(ours)
    assert {s.target: s.shape for s in keys.plan_save(shapes(ours))} == shapes(theirs)
