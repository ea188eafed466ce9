"""Numbers in sentences."""

from lapis.wording import format_count, format_packed, format_part


def test_one_is_one_and_others_are_many() -> None:
    assert [format_count(n, "step") for n in (0, 1, 2, 1000)] == ["0 steps", "1 step", "2 steps", "1,000 steps"]
    assert format_count(1, "matrix is", "matrices are") == "1 matrix is"
    assert format_count(3, "matrix is", "matrices are") == "3 matrices are"
    assert format_packed(1, 12) == "1 text, 12 tokens"
    assert format_part(1, 3, "shard", "is missing", "are missing") == "1 of 3 shards is missing"
    assert format_part(2, 2, "shard", "is missing", "are missing") == "2 of 2 shards are missing"
