"""Triton kernels for compiled steps on a GPU; which is which: cifar/kernels/__init__.py."""
