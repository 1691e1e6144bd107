"""Kernels, and ways to use torch's, where a profile says that they matter (LOG.md).

On a CPU: pieces.py, a convolution, a ReLU and max-pooling a few images at a time.

In Triton, for compiled steps and their evaluations on a GPU: plain.py, 3 x 3 convolutions with few channels; squares.py and
pooled.py, those together with the bias, ReLU and pooling that follow; halves.py, 2 x 2 max-pooling by itself; network.py, which
of a network's modules use them. Such a kernel is used only where it has given torch's answer on this GPU, for as many images
that lie as they will; elsewhere torch's own is.
"""
