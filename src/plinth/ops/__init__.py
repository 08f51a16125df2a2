"""Operations of the models: each with a plain twin in PyTorch, and kernels of ours where they pay."""

import torch

# PyTorch's cosines, sines, exponentials and logarithms come from MKL, which chooses its code for this processor at the first call. When
# two threads make that call at once, one of them can get another code, whose last bits differ: in a few of 1,000 processes the
# first micro-batch had other rotary angles, so that two equal runs parted. Here one thread makes the first call before there are others.
torch.ones(16).cos()
