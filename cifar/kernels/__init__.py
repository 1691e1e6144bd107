"""Kernels of our own, for what a profile showed to take long (LOG.md).

On a CPU: cpu_conv_pool.py, a convolution, a ReLU and max-pooling for a few images at a time.

In triton/, for compiled steps and their evaluations on a GPU:
* conv3x3.py: 3 x 3 convolutions with few channels;
* batch_norm.py: BatchNorm in training, with the convolution before it and the ReLU after it;
* conv_relu_pool.py: convolutions with the bias, ReLU and pooling that follow;
* max_pool.py: 2 x 2 max-pooling by itself;
* verify.py: a kernel is used only after it has given torch's answer on this GPU, for images of these sizes and with these
  strides; otherwise torch's is;
* launch.py: what launching them has in common.

fuse.py decides which modules of a network use them.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def digest_sources() -> str:
    """A digest of all files of kernels. Code that was compiled with other kernels must not be used."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
