"""One thread: the protocol's arithmetic, and no contention with the workers that some tests start."""

import torch

torch.set_num_threads(1)
