"""Checkpoints and weights on disk: what is written comes back, and nothing of it is a pickle."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from helpers import blobs
from kdbench.engine.tensors import load_state, load_tensors, load_weights, save_state, save_tensors, save_weights
from kdbench.errors import KdbenchError
from kdbench.zoo.networks import mini_8


def trained(
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], steps: int = 3
) -> tuple[nn.Module, Any]:
    """A network after some steps on blobs, and the optimiser that took them."""
    data = blobs().train
    torch.manual_seed(0)
    net = mini_8(data.shape, data.classes)
    opt = optimizer(net.parameters())
    return step(net, opt, steps), opt


def step(net: nn.Module, opt: torch.optim.Optimizer, steps: int) -> nn.Module:
    data = blobs().train
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        opt.step()
    return net


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
}


def same(one: Any, other: Any) -> bool:
    """Equal down to bits and types; a tuple counts as a list."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimisers_state_comes_back_down_to_integer_keys(tmp_path: Path, name: str) -> None:
    net, opt = trained(OPTIMIZERS[name])
    save_state({"model": net.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "c")
    back = load_state(tmp_path / "c")
    assert same(opt.state_dict(), back["optimizer"])
    assert same(dict(net.state_dict()), back["model"])
    assert all(isinstance(key, int) for key in back["optimizer"]["state"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    net, opt = trained(OPTIMIZERS[name])
    save_state({"model": net.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "c")
    step(net, opt, 3)
    other, second = trained(OPTIMIZERS[name], steps=1)
    back = load_state(tmp_path / "c")
    other.load_state_dict(back["model"])
    second.load_state_dict(back["optimizer"])
    step(other, second, 3)
    assert same(dict(net.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        None,
        True,
        {"a": None, "b": False, "c": True, "d": 0, "e": -1.5, "f": "text", "g": ""},
        {"nested": [[1, [2, []]], {"x": [{"y": None}]}]},
        {1: "one", "1": "another", 2.5: None},
        {"inf": float("inf"), "small": 5e-324, "third": 1 / 3, "large": 2**70},
        {"betas": (0.9, 0.999)},
        [torch.tensor(3), torch.tensor(2.5, dtype=torch.float64), torch.empty(0, 3), torch.tensor([True, False])],
        {"bytes": torch.arange(5, dtype=torch.uint8), "half": torch.ones(2, dtype=torch.bfloat16)},
        {"strided": torch.arange(12).reshape(3, 4).T, "tensor": torch.zeros(1), "value": {"list": 1}},
    ],
    ids=repr,
)
def test_a_state_comes_back_as_it_was(tmp_path: Path, state: Any) -> None:
    save_state(state, tmp_path / "c")
    assert same(state, load_state(tmp_path / "c"))


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    x = torch.arange(4.0)
    save_state({"x": x, "view": x[1:]}, tmp_path / "c")
    back = load_state(tmp_path / "c")
    back["x"].zero_()
    assert back["view"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "state",
    [{1, 2}, object(), b"bytes", 1j, nn.Linear(1, 1), lambda: 0, {"deep": [{"in": {3}}]}, {(1, 2): 3}, {b"k": 1}],
)
def test_a_state_of_anything_else_is_refused(tmp_path: Path, state: Any) -> None:
    with pytest.raises(KdbenchError, match="a checkpoint holds"):
        save_state(state, tmp_path / "c")
    assert os.listdir(tmp_path) == []


def test_a_state_that_was_never_saved_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "absent") is None


def test_a_damaged_state_is_none(tmp_path: Path) -> None:
    """Cut off anywhere, empty, noise, or tensors that are no checkpoint: a checkpoint only saves work."""
    path = tmp_path / "c"
    save_state({"model": {"w": torch.arange(6.0)}, "epochs": 3}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_state(path) is None, length
    for noise in (b"\xff" * 200, b"\x80\x04}q\x00.", whole[:8] + b"x" * 300, b"{" * 500):
        path.write_bytes(noise)
        assert load_state(path) is None
    save_tensors({"w": torch.zeros(2)}, path)
    assert load_state(path) is None
    path.write_bytes(whole)
    assert load_state(path)["epochs"] == 3


def test_a_checkpoint_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    save_state({"epochs": 1}, path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_state({"epochs": 2}, path)
    assert load_state(path) == {"epochs": 1}


def test_checkpoints_and_weights_are_safetensors_and_json(tmp_path: Path) -> None:
    net, opt = trained(OPTIMIZERS["adam"])
    save_state({"model": net.state_dict(), "optimizer": opt.state_dict(), "epochs": 3}, tmp_path / "state")
    save_weights(net, tmp_path / "weights")
    with safe_open(tmp_path / "weights", framework="pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    with safe_open(tmp_path / "state", framework="pt") as file:
        json.loads(file.metadata()["state"])
    for path in tmp_path.iterdir():
        length = int.from_bytes(path.read_bytes()[:8], "little")
        json.loads(path.read_bytes()[8 : 8 + length])  # the header of a safetensors file
        assert b"pickle" not in path.read_bytes()


def test_weights_come_back_in_eval_mode(tmp_path: Path) -> None:
    net, _ = trained(OPTIMIZERS["sgd"])
    save_weights(net, tmp_path / "w")
    torch.manual_seed(1)
    data = blobs().train
    other = load_weights(mini_8(data.shape, data.classes), tmp_path / "w")
    assert not any(module.training for module in other.modules())
    assert same(dict(net.state_dict()), dict(other.state_dict()))
    assert same(load_tensors(tmp_path / "w"), {name: net.state_dict()[name] for name in load_tensors(tmp_path / "w")})


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_weights(trained(OPTIMIZERS["sgd"])[0], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
