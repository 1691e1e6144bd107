"""Kernels, and ways to use torch's, where a profile says that they matter (LOG.md).

On a CPU: pieces.py, a convolution, a ReLU and max-pooling a few images at a time.

In Triton, for compiled steps and their evaluations on a GPU: plain.py (its kernels are in lines.py and taps.py), 3 x 3
convolutions with few channels; norms.py (sums.py), BatchNorm in training with the convolution before and the ReLU after it;
pooled.py (squares.py), convolutions with the bias, ReLU and pooling that follow; halves.py, 2 x 2 max-pooling by itself;
network.py, which of a network's modules use them. Such a kernel is used only where it has given torch's answer on this GPU,
for as many images that lie as they will; elsewhere torch's own is.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


@functools.cache
def version() -> str:
    """A digest of these files: what was compiled with others must not be used."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
