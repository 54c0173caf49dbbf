"""Parts of labelled images in which each class has its share: held out, or enough for a small budget."""

import torch
from torch import Tensor

from kdbench.api import KdbenchError, Split


def held_out(data: Split, count: int, seed: int) -> tuple[Split, Split]:
    """The rest of `data`, and `count` images of it with each class in its share, both in the original order.

    Raises `KdbenchError` when no image would be left, or a class would have none in the part.
    """
    if count >= len(data):
        raise KdbenchError(f"dataset.validation: {count:,} images leave none of {len(data):,} to train on.")
    part = shared(data.y, count, seed, "validation")
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[part] = False
    return data.take(rest.nonzero().flatten()), data.take(part)


def reduced(data: Split, count: int, seed: int, field: str) -> Split:
    """`count` images of `data` with each class in its share, in the original order; all of them where `count` is 0.

    Of one seed, the images of a class in a smaller part are in the larger ones too. Raises `KdbenchError`, naming the
    `field` that holds the count, when there are not so many, or a class would have none.
    """
    if not count:
        return data
    if count > len(data):
        raise KdbenchError(f"dataset.{field}: there are {len(data):,} images, not {count:,} to choose.")
    return data.take(shared(data.y, count, seed, field))


def shared(y: Tensor, count: int, seed: int, field: str) -> Tensor:
    """Indices (count,), ascending, of images with labels `y` (N,), drawn so that each class has its share to the image.

    Raises `KdbenchError`, naming the `field` that holds the count, when the share of a class is none.
    """
    generator = torch.Generator().manual_seed(seed)
    quotas = _quotas(y.bincount(), count)
    drawn = []
    for label, quota in enumerate(quotas.tolist()):
        members = (y == label).nonzero().flatten()
        if len(members) and not quota:
            few = f"{count:,} of {len(y):,} images are too few"
            raise KdbenchError(f"dataset.{field}: {few}: class {label} would have none.")
        drawn.append(members[torch.randperm(len(members), generator=generator)[:quota]])
    return torch.cat(drawn).sort().values


def _quotas(sizes: Tensor, count: int) -> Tensor:
    """`count` divided by the sizes of the classes; what is left of one goes to the largest remainders."""
    exact = sizes * count  # in parts of all images: whole numbers, so that ties are ties
    quotas = exact // sizes.sum()
    left = count - int(quotas.sum())
    quotas[(exact % sizes.sum()).argsort(descending=True, stable=True)[:left]] += 1
    return quotas
