"""What a training costs beside seconds: joules and floating-point operations."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from cifar.flops import LayerCost
from cifar.system.energy import EnergyMeter
from cifar.system.environment import gpu_uuid
from cifar.training.distributed import DistributedContext

FORWARDS_PER_STEP = 3  # the backward pass costs two: the gradients of a layer's input, and those of its weights

# -- joules ------------------------------------------------------------------------------------------------------------


class EnergyUser(Protocol):
    """A run on its way. `joules`: what it has used, from its first step on; None if a part of that is not known."""

    joules: float | None
    joules_problem: str  # why it is not known; "" where there is no GPU to ask
    has_retired: bool


class SharedEnergy:
    """Divides the energy of one or several GPUs among the runs that are trained on them side by side."""

    def __init__(
        self,
        runs: Sequence[EnergyUser],
        meter: EnergyMeter | None,
        *,
        problem: str = "",
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        """meter: None where nothing can be measured, and `problem` says why. synchronize: waits for the GPU's work."""
        self._runs, self._meter, self._problem, self._synchronize = list(runs), meter, problem, synchronize
        self._used = 0.0

    def settle(self) -> None:
        """Give each run that has not retired its share of what was used since the last call. Waits for the device."""
        used, problem = None, self._problem
        if self._meter:
            self._synchronize()  # what has been launched is not done yet
            used, problem = self._meter.read(), self._meter.problem
        going = [run for run in self._runs if not run.has_retired]
        for run in going:
            if used is None or run.joules is None:
                run.joules, run.joules_problem = None, run.joules_problem or problem
            else:
                run.joules += (used - self._used) / len(going)
        self._used = self._used if used is None else used


def share_energy(runs: Sequence[EnergyUser], device: torch.device, context: DistributedContext) -> SharedEnergy:
    """Measure from now on. Of several ranks, rank 0 measures the GPUs of all of them."""
    uuids = [gpu_uuid(device)] if device.type == "cuda" else []
    if context.world_size > 1:
        gathered = context.all_gather((socket.gethostname(), uuids))
        if device.type == "cuda" and len({host for host, _ in gathered}) > 1:
            return SharedEnergy(runs, None, problem="its processes are on several machines")
        uuids = [uuid for _, rank_uuids in gathered for uuid in rank_uuids]
    if device.type != "cuda" or context.rank:
        return SharedEnergy(runs, None)
    if not all(uuids):
        return SharedEnergy(runs, None, problem="no NVIDIA GPU")
    meter = EnergyMeter(list(dict.fromkeys(uuids)))
    return SharedEnergy(runs, meter, synchronize=lambda: torch.cuda.synchronize(device))


# -- floating-point operations -----------------------------------------------------------------------------------------


def count_train_flops(macs: float, num_images: int, idle_weights: Iterable[tuple[float, int]] = ()) -> float:
    """FLOPs of the forward and backward passes of a training: 2 x 3 x MACs x images, two for each multiply-add.

    idle_weights: (MACs of a layer, images) for weights that do not learn, or not in all of the training. Their gradients are
    not computed, so these images cost the layer two passes. Normalisation, augmentation, the update and evaluations do not
    count.
    """
    total = FORWARDS_PER_STEP * macs * num_images
    return float(2 * (total - sum(layer_macs * images for layer_macs, images in idle_weights)))


def find_idle_weights(
    model: nn.Module, optimizer: Any, layers: Sequence[LayerCost], progress: Sequence[float], batch_size: int
) -> list[tuple[float, int]]:
    """What `count_train_flops` takes: the layers whose weights get no gradient, and for how many images.

    progress: of the training before each of its steps. A layer with weights of both kinds counts by their sizes.
    """
    stops = {name: 1.0 if parameter.requires_grad else 0.0 for name, parameter in model.named_parameters()}
    for group in getattr(optimizer, "groups", ()):
        stops |= dict.fromkeys((name for name in group.names if stops.get(name)), group.freeze_after)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 1}
    found = []
    for layer in layers:
        weights = {
            name: size for name, size in sizes.items() if layer.macs and name.startswith(f"{layer.name}." if layer.name else "")
        }
        for name, size in weights.items():
            if stops[name] < 1:
                num_idle = sum(done >= stops[name] for done in progress)
                found.append((layer.macs * size / sum(weights.values()), num_idle * batch_size))
    return found


def is_any_weight_idle(model: nn.Module, optimizer: Any) -> bool:
    """Whether `find_idle_weights` could find one, so that the network's layers have to be counted."""
    freezing = {name for group in getattr(optimizer, "groups", ()) if group.freeze_after < 1 for name in group.names}
    return any(
        parameter.ndim > 1 and (not parameter.requires_grad or name in freezing) for name, parameter in model.named_parameters()
    )
