"""Triton's kernels in tests: on a GPU as they are used, elsewhere by Triton's interpreter, chosen when this is imported."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter


def mend_interpreter() -> None:
    """Triton 3.6 (of torch 2.11) makes indices by `int(array)`, which NumPy 2.4 refuses for an array with a dimension."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


GPU = torch.cuda.is_available()
DEVICE, DTYPES = ("cuda", [torch.bfloat16]) if GPU else ("cpu", [torch.float32, torch.float16])  # interpreted bf16 is wrong
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
with pytest.MonkeyPatch.context() as patch:
    if not GPU:
        patch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined
        if torch.__version__ < "2.15":
            mend_interpreter()
    for name in ("conv3x3", "conv_relu_pool", "max_pool", "batch_norm"):
        importlib.import_module(f"cifar.kernels.triton.{name}")


def slow_here(*values: Any) -> Any:
    """Parameters of a test that takes seconds in the interpreter."""
    return pytest.param(*values, marks=() if GPU else pytest.mark.slow)


BY_DTYPE = pytest.mark.parametrize("dtype", [DTYPES[0], *map(slow_here, DTYPES[1:])], ids=str)


def draw_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def forget_verifications(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Have a module's kernels verified anew, in this test and after it."""
    monkeypatch.setattr(module.verifier, "results", {})


def record_verifications(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[bool]:
    """What verifying a module's kernels gives from here on: right or not."""
    results: list[bool] = []
    verify = module.verifier.verify
    forget_verifications(monkeypatch, module)

    def verify_and_record(case: Any) -> bool:
        results.append(verify(case))
        return results[-1]

    monkeypatch.setattr(module.verifier, "verify", verify_and_record)
    return results


def measure_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())
