"""Checkpoints and weights on disk: tensors as safetensors, the rest as JSON. No pickle is ever written or read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from kdbench.atomic import write_bytes
from kdbench.errors import KdbenchError

STATE = "state"


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the parameters and buffers of `model`."""
    save_tensors(model.state_dict(), path)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Put the parameters and buffers at `path` into `model`, which is left in eval mode."""
    model.load_state_dict(load_tensors(path))
    return model.eval()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors; shared storage is written out for each name."""
    save_file(_writable(tensors), path)


def load_tensors(path: Path, *names: str) -> dict[str, Tensor]:
    """Read the tensors of these names onto the CPU; without names, all."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def shape_of(path: Path, name: str) -> tuple[int, ...]:
    """The shape of one of the tensors at `path`, of which nothing else is read."""
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice(name).get_shape())


def save_state(state: Any, path: Path) -> None:
    """Write nested mappings and lists of tensors and plain values, replacing the file in one step."""
    tensors: dict[str, Tensor] = {}
    skeleton = _take_out(state, tensors)
    write_bytes(path, save(_writable(tensors), {STATE: json.dumps(skeleton)}))


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote; None when the file is absent or unreadable: a checkpoint only saves work."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads(file.metadata()[STATE])
            return _put_back(skeleton, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _take_out(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):  # pairs: JSON would turn an optimiser's integer keys into strings
        return {"mapping": [[_plain(key), _take_out(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_take_out(item, tensors) for item in value]}
    return {"value": _plain(value)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise KdbenchError(f"a checkpoint holds tensors and plain values, not a {type(value).__name__}")


def _put_back(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    [(kind, value)] = skeleton.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: _put_back(item, tensors) for key, item in value}
    if kind == "list":
        return [_put_back(item, tensors) for item in value]
    return value
