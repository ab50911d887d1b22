import pytest

from ff_utils import checks


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, float("nan"), float("inf")])
def test_a_whole_number_is_refused_by_name_and_value(value):
    with pytest.raises(ValueError, match=r"epochs is .*; give a whole number of at least 1"):
        checks.number("epochs", value, 1, 100, whole=True)


def test_the_ends_of_a_range_belong_to_it_unless_above_is_said():
    checks.number("rate", 0, 0, 1)
    checks.number("rate", 1, 0, 1)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        checks.number("rate", 0, 0, 1, above=True)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"loss is 'huber'; choose one of: a, b\."):
        checks.one_of("loss", "huber", ["a", "b"])


def test_a_bad_entry_of_a_list_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"hidden\[1\] is 0"):
        checks.whole_numbers("hidden", [10, 0], 1)
    with pytest.raises(ValueError, match="non-empty list"):
        checks.whole_numbers("hidden", [], 1)
