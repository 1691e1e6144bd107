"""Bounds of what is built: a network of a hundred thousand layers is a slip of the finger, and would take minutes to make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from cifar.errors import UserError

MAX_MODULES = 8000  # ResNet-1202 has 6,011; to build and count one takes a millisecond
MAX_PARAMETERS = 2**29  # 2 GiB of float32; the largest network of the CIFAR literature has a tenth
_TOO_LARGE = ("memory", "overflow", "too large", "exceeds")  # in what torch says where a tensor cannot be made


@contextlib.contextmanager
def limit_size(name: str) -> Iterator[None]:
    """Raise UserError as soon as the network `name`, which is built inside, has too many modules or parameters."""
    num_modules = num_parameters = 0

    def count_module(parent: Any, key: str, module: Any) -> None:
        nonlocal num_modules
        num_modules += 1
        if num_modules > MAX_MODULES:
            raise UserError(f"model '{name}' would have more than {MAX_MODULES:,} layers; take a smaller depth")

    def count_parameter(parent: Any, key: str, parameter: Any) -> None:
        nonlocal num_parameters
        num_parameters += 0 if parameter is None or not hasattr(parameter, "numel") else _count_elements(parameter)
        if num_parameters > MAX_PARAMETERS:
            raise UserError(f"model '{name}' would have more than {MAX_PARAMETERS:,} parameters; take a smaller width or depth")

    hooks = [register_module_module_registration_hook(count_module)]
    hooks.append(register_module_parameter_registration_hook(count_parameter))
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, MemoryError) or any(word in first.lower() for word in _TOO_LARGE):
            raise UserError(f"model '{name}' is too large to be made ({first}); take smaller values") from error
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _count_elements(parameter: Any) -> int:
    try:
        return int(parameter.numel())
    except (RuntimeError, ValueError):  # a lazy parameter has no shape yet
        return 0
