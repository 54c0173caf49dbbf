"""What this machine offers a run: cores, devices and precisions."""

import os

import torch

from kdbench.errors import KdbenchError
from kdbench.game.methods import Precision


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str) -> str:
    """The device to use; "auto" is the best there is. Raises `KdbenchError` when a named one is absent."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        raise KdbenchError(
            f"The device '{name}' is not available here. Available: {', '.join(d for d in there if there[d])}."
        )
    return name


def choose_precision(name: str, device: str) -> Precision:
    """The precision to use; "auto" is bf16 on a GPU or CPU that computes in it natively, fp32 elsewhere."""
    if name == "auto":
        native = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(), "cpu": _cpu_has_bf16()}
        return "bf16" if native.get(device, False) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        abilities = torch.cpu.get_capabilities()
    except AttributeError:  # an older torch does not tell
        return False
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
