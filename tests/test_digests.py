"""Digests of values."""

import hashlib

import pytest

from kdbench.engine.digests import digest


def test_a_digest_depends_on_values_and_not_on_their_order() -> None:
    one, other = {"a": 1, "b": {"c": (1, 2), "d": None}}, {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert digest(one) == digest(other)
    assert len(digest(one)) == 32
    assert digest(one) == hashlib.sha256(b'{"a":1,"b":{"c":[1,2],"d":null}}').hexdigest()[:32]


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": 1, "b": None}, {"a": "1"}, {"a": [1]}, {"a": True}])
def test_a_digest_changes_with_any_value(other: object) -> None:
    assert digest(other) != digest({"a": 1})


def test_what_is_not_a_number_has_no_digest() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})
