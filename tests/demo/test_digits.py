"""The handwriting: complete, unchanged, and split where a writer's form begins."""

from __future__ import annotations

from vlkit.demo.digits import FIRST_UNSEEN, load_digits


def test_all_digits_are_on_one_side_of_the_split() -> None:
    seen, unseen = load_digits("seen"), load_digits("unseen")
    assert (len(seen.labels), len(unseen.labels)) == (FIRST_UNSEEN, 1797 - FIRST_UNSEEN)
    for digits in (seen, unseen):
        assert digits.images.shape == (len(digits.labels), 8, 8)
        assert digits.images.min() == 0
        assert digits.images.max() == 1
        assert set(digits.labels) == set(range(10))


def test_no_image_is_on_both_sides() -> None:
    both = {image.tobytes() for image in load_digits("seen").images} & {
        i.tobytes() for i in load_digits("unseen").images
    }
    assert not both


def test_the_split_is_where_a_form_begins() -> None:
    """Every writer filled in the same form: 0 to 9, three times, then digits in one fixed order."""
    first_lines = [*range(10)] * 3
    unseen = load_digits("unseen").labels
    assert unseen[:30].tolist() == first_lines
    assert load_digits("seen").labels[:30].tolist() == first_lines
    assert unseen[30:60].tolist() == load_digits("seen").labels[30:60].tolist()


def test_the_digits_are_those_of_the_published_set() -> None:
    """The first image and the last labels, as scikit-learn's copy has them."""
    first = (load_digits("seen").images[0] * 16).astype(int)
    assert first.sum() == 294
    assert first[0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert load_digits("unseen").labels[-5:].tolist() == [9, 0, 8, 9, 8]
