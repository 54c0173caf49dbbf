"""Methods of values that never change, computed once for each combination of arguments."""

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


def remembered(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """Keeps a method's results on the instance, and so no longer than the instance lives; `functools.cache` keeps both."""

    @wraps(method)
    def once(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        known: dict[Hashable, R] = self.__dict__.setdefault(f"_{method.__name__}_results", {})
        key = (args, tuple(kwargs.items()))
        if key not in known:
            known[key] = method(self, *args, **kwargs)
        return known[key]

    return once
