"""All that an author of a defense needs to test."""

import pytest
from kdbench_rounding import Rounding

from kdbench.testing import check_defense


@pytest.mark.parametrize("decimals", [1, 3])
def test_rounding_keeps_the_contract(decimals: int) -> None:
    check_defense(Rounding(decimals))
