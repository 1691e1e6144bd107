"""What has to be done to a network before it can be measured: lazy modules, copies, the random state."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

INPUT_SHAPE = (1, 3, 32, 32)


def materialize_lazy_modules(model: nn.Module, seed: int = 0, input_shape: tuple[int, ...] = INPUT_SHAPE) -> None:
    """Give lazy modules (`nn.LazyLinear`) their parameters, by a forward pass of a black image in evaluation mode.

    The parameters are drawn from the seed alone. The random state, and a network without lazy modules, do not change.
    """
    if not any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return
    modes = {module: module.training for module in model.modules()}
    with keep_random_state(seed), torch.no_grad():
        model.eval()(torch.zeros(input_shape))
    for module, mode in modes.items():
        module.training = mode


@contextlib.contextmanager
def keep_random_state(seed: int = 0) -> Iterator[None]:
    """Random numbers inside come from the seed. Afterwards, the generators of torch, Python and NumPy are where they were."""
    python = random.getstate()
    numpy = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def read_random_state() -> tuple[Any, ...]:
    """Equal to another reading if no random number was drawn between the two."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]


@contextlib.contextmanager
def borrow(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the network on the CPU. What cannot be copied is lent itself, then restored."""
    try:
        copied = copy.deepcopy(model).to("cpu")
    except Exception:  # whatever a network of somebody's has in it; old weight normalisation cannot be copied, for one
        with _restore_state(model):
            yield model
        return
    yield copied


def widen_weights(network: nn.Module, image: Tensor) -> None:
    """Make weights of 16 bits 32 bits wide, in place, if the network does not take images of 32 bits as it is."""
    narrow = [
        tensor
        for tensor in (*network.parameters(), *network.buffers())
        if not is_lazy(tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
    ]
    if not narrow:
        return
    modes = {module: module.training for module in network.modules()}
    try:
        with keep_random_state(), torch.no_grad():
            network.eval()(image)
    except Exception:  # of whatever kind; the measurement raises it if wider weights do not help
        for tensor in narrow:
            tensor.data = tensor.data.float()
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _restore_state(model: nn.Module) -> Iterator[None]:
    def clone(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None or is_lazy(tensor) else tensor.detach().clone()

    modules = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    values = [(tensor, clone(tensor)) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        for module, training, buffers in modules:
            module.training = training
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values:
                if value is not None:
                    tensor.copy_(value)
