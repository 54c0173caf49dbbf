"""Images resized to the shape of the victim's, as surrogate data is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdbench.api import KdbenchError
from kdbench.game.data import resized


def test_images_of_the_right_shape_stay_as_they_are() -> None:
    x = torch.rand(5, 3, 6, 7)
    assert torch.equal(resized(x, (3, 6, 7)), x)
    assert torch.equal(resized(x[:, :2], (2, 6, 7)), x[:, :2])


def test_grey_images_become_colours_that_are_grey() -> None:
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(resized(x, (3, 8, 8)), torch.cat([x, x, x], dim=1))


def test_colours_become_their_luminance() -> None:
    """ITU-R BT.601: red 0.299, green 0.587, blue 0.114."""
    pure = torch.eye(4, 3)[:, :, None, None].expand(-1, -1, 2, 2)
    pure = torch.cat([pure, torch.ones(1, 3, 2, 2)])
    expected = torch.tensor([0.299, 0.587, 0.114, 0.0, 1.0]).reshape(5, 1, 1, 1).expand(-1, 1, 2, 2)
    torch.testing.assert_close(resized(pure, (1, 2, 2)), expected)


def test_there_and_back_grey_stays_grey() -> None:
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(resized(resized(x, (3, 8, 8)), (1, 8, 8)), x)


def test_a_fine_pattern_becomes_grey_and_no_coarse_one() -> None:
    """A chessboard of single pixels at half the size: without a filter it would come out black, white or striped."""
    chess = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().reshape(1, 1, 16, 16)
    small = resized(chess, (1, 8, 8))
    assert (small - 0.5).abs().max() < 0.02


@given(
    st.sampled_from([(1, 1), (1, 3), (3, 1), (3, 3), (4, 4)]),
    st.tuples(*[st.integers(1, 20)] * 4),
    st.sampled_from([0.0, 1.0, 0.3]),
)
def test_whatever_the_shape_images_are_of_it_and_in_range(
    channels: tuple[int, int], sides: tuple[int, int, int, int], level: float
) -> None:
    """An image of one colour keeps it; none leaves [0,1]."""
    before, shape = (channels[0], *sides[:2]), (channels[1], *sides[2:])
    even, wild = torch.full((2, *before), level), torch.rand(2, *before).round()
    x = resized(torch.cat([even, wild]), shape)
    assert x.shape == (4, *shape)
    assert x.is_contiguous()
    assert x.amin() >= 0
    assert x.amax() <= 1
    torch.testing.assert_close(x[:2], torch.full((2, *shape), level), atol=1e-5, rtol=0)


def test_no_images_are_no_images_in_any_shape() -> None:
    assert resized(torch.rand(0, 3, 32, 32), (1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(("own", "asked"), [(2, 3), (3, 2), (1, 2), (4, 3), (4, 1)])
def test_channels_of_which_nothing_is_known_are_refused(own: int, asked: int) -> None:
    said = rf"^images of {own} channels cannot be made to have {asked}; 1 and 3 can\.$"
    with pytest.raises(KdbenchError, match=said):
        resized(torch.rand(2, own, 8, 8), (asked, 8, 8))
