"""What the forkserver imports once, so that a stage starts in 0.02 s: torch, and what its first uses import."""

import torch
import torchattacks  # noqa: F401
import torchvision.utils  # noqa: F401

import kdbench.engine.worker  # noqa: F401

torch.use_deterministic_algorithms(True)  # imports the compiler stack, a second of it
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, fused=True)
if torch.cuda.is_initialized():
    raise RuntimeError("the forkserver must not touch CUDA: its children could not use it")
