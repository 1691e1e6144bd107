"""Fixtures of several files of these tests."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton"):
    import helpers.kernels  # chooses the interpreter where there is no GPU, before a test file imports a kernel


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by Triton's interpreter, where there is no GPU."""
    import triton.language as tl

    from cifar.kernels.triton import batch_norm, batch_norm_kernels, conv3x3_kernels
    from cifar.kernels.triton.launch import LaunchConfig

    if not helpers.kernels.GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # and where it runs
        for module in (
            conv3x3_kernels,
            batch_norm_kernels,
        ):  # the same sum, not called for each number
            monkeypatch.setattr(module, "add", tl.standard._sum_combine)
        config = LaunchConfig(256, 4, 1, 1)
        monkeypatch.setattr(batch_norm, "PIXEL_SUMS_CONFIG", config)
        monkeypatch.setattr(batch_norm, "GRADIENT_SUMS_CONFIGS", {True: config, False: config})
