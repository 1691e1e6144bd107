"""A Triton kernel is used only after it has given torch's answer on this GPU.

Each operator of this package has two implementations: `NAME_triton`, and `NAME_reference`, which is torch's. A file has one
`Verifier`, which says for given images which of the two is used. What Triton cannot compile or computes wrongly on some GPU,
torch computes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cifar.kernels.triton.launch import Shape, to_channels_last

MAX_VERIFIED_IMAGES = 2048  # a kernel is tried with at most so many
REL_TOLERANCE = 1e-2  # relative error of a sum of products of bf16 numbers that is rounded to bf16


class KernelCase(NamedTuple):
    """All that the answer of a kernel may depend on. Each case is verified once in a process."""

    kernel: str  # which one of the file
    shape: tuple[int, ...]  # (N, C, H, W) of the images at full size
    out_channels: int
    options: tuple[Any, ...]  # what else it is given: strides of the filters (O, I, H, W), or scalars
    dtype: torch.dtype
    device: torch.device


class RandomInputs:
    """Inputs to try the kernel of a case with. They are the same each time."""

    def __init__(self, case: KernelCase) -> None:
        self.case = case
        self.generator = torch.Generator(case.device).manual_seed(0)

    def draw_normal(self, *shape: int) -> Tensor:
        """float32 from a standard normal distribution."""
        return torch.randn(shape, generator=self.generator, device=self.case.device)

    def draw_images(self, *shape: int) -> Tensor:
        """Normal, in the precision of the case, channels last in memory."""
        return to_channels_last(self.draw_normal(*shape).to(self.case.dtype))

    def draw_filters(self, *shape: int) -> Tensor:
        """float32 numbers that the precision of the case can hold, with the strides of the case."""
        filters = torch.empty_strided(shape, self.case.options, device=self.case.device)
        return filters.copy_(self.draw_normal(*shape).to(self.case.dtype))


class Verifier:
    """Says whether the Triton kernels of a file may be used."""

    def __init__(self, supports: Callable[[KernelCase], bool], matches: Callable[[KernelCase, RandomInputs], bool]) -> None:
        """`supports`: whether a kernel is meant for a case. `matches`: whether it gives torch's answer there, by trying it."""
        self.supports, self.matches = supports, matches
        self.results: dict[KernelCase, bool] = {}

    def can_use(
        self, kernel: str, x: Tensor, out_channels: int, options: tuple[Any, ...] = (), shape: Shape | None = None
    ) -> bool:
        """Whether to use a kernel for the images x. `shape`: of the images at full size, where that is not x's."""
        count, *rest = x.shape if shape is None else shape
        case = KernelCase(kernel, (min(count, MAX_VERIFIED_IMAGES), *rest), out_channels, options, x.dtype, x.device)
        return fits_int32((count, *rest), out_channels) and self.supports(case) and self.is_verified(case)

    def is_verified(self, case: KernelCase) -> bool:
        """Whether the kernel gives torch's answer; tried at the first call for each case."""
        if case not in self.results:
            self.results[case] = self.verify(case)
        return self.results[case]

    @torch.no_grad()
    def verify(self, case: KernelCase) -> bool:
        """Try the kernel. What Triton cannot do is no error, as torch can do it."""
        try:
            return self.matches(case, RandomInputs(case))
        except (triton.runtime.errors.TritonError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise
            return False


def fits_int32(shape: Shape, out_channels: int) -> bool:
    """Whether 32 bits can index the values of the images (N, C, H, W), and those of the results: the kernels do that."""
    count, channels, height, width = shape
    return count * height * width * max(channels, out_channels) < 2**31


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    return bool((actual.float() - expected).norm() < REL_TOLERANCE * expected.norm())
