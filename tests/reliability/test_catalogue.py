"""What lapis claims to survive is tried by a test that says so, and no test names what is not claimed."""

from .catalogue import CLAIMED, named


def test_each_claimed_fault_is_named_by_a_test_and_no_other() -> None:
    assert not set(CLAIMED) - set(named()), "no test names these"
    assert not set(named()) - set(CLAIMED), "tests name these; CLAIMED says nothing of them"
