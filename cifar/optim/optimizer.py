"""The optimizer: groups of named parameters, each with an update rule, and the schedule of their learning rates.

A rule is a short function over lists of tensors that updates them in place. Its scalars are 0-d tensors on the parameters'
device, and it reads nothing on the host. So a step can be captured once as a CUDA graph, and the lr can still change.
Build an optimizer after the model has its device and memory format.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cifar.errors import UserError
from cifar.optim.parameter_roles import DECAYING_ROLES, find_roles
from cifar.optim.schedules import Schedule

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # a learning rate or a decay
Momentum = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

Rule = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], dict[str, Tensor]], None]
"""(parameters, their gradients, state by name, scalars by name) -> None. The schedule is already in `hyper["lr"]`.

Settings that are not scalars are bound with functools.partial. Two partials of the same function with equal keywords count
as the same rule; then one optimizer can take over the scalars of the other in place (`Optimizer.reinitialize_from`).
"""


roles = find_roles  # old name, for plug-ins


@dataclass(frozen=True)
class Parameters:
    """The parameters that train, by name, and their roles (`cifar.optim.parameter_roles`), or roles of the model's own."""

    tensors: dict[str, Tensor]
    roles: dict[str, str]

    @classmethod
    def from_model(cls, model: nn.Module) -> Parameters:
        return cls({n: p for n, p in model.named_parameters() if p.requires_grad}, find_roles(model))

    def with_roles(self, wanted: Iterable[str]) -> dict[str, Tensor]:
        """The parameters that have one of the wanted roles."""
        wanted = set(wanted)
        return {name: tensor for name, tensor in self.tensors.items() if self.roles[name] in wanted}

    def split_by_decay(self, decay_norm_and_bias: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(parameters with weight decay, parameters without). Norms, biases and embeddings decay only if asked for."""
        decayed = self.tensors if decay_norm_and_bias else self.with_roles(DECAYING_ROLES)
        return decayed, {name: tensor for name, tensor in self.tensors.items() if name not in decayed}

    of, named, halves = from_model, with_roles, split_by_decay  # old names, for plug-ins


class _ReadUntil(float):
    """The value of `group.until`, which is told from one that a caller gives."""


@dataclass(frozen=True)
class Group:
    """Parameters that share a rule and its scalars. `state_names` are tensors like the parameters, `counters` are 0-d.

    hyper["lr"] is the base lr, which the schedule multiplies. With `freeze_after` < 1 the group ignores the schedule: its lr
    falls linearly to zero at that fraction of the training and stays zero. A rule must not change parameters at lr 0.
    """

    names: Sequence[str]
    params: Sequence[Tensor]
    rule: Rule
    hyper: dict[str, float]
    state_names: tuple[str, ...] = ()
    freeze_after: float = 1.0
    counters: tuple[str, ...] = ()
    until: InitVar[float | None] = None  # old name of `freeze_after`, for plug-ins

    def __post_init__(self, until: float | None) -> None:
        if until is not None and not isinstance(until, _ReadUntil):  # else dataclasses.replace copies it
            object.__setattr__(self, "freeze_after", until)


# For plug-ins that read the old name.
Group.until = property(lambda group: _ReadUntil(group.freeze_after))  # type: ignore[attr-defined]


OLD_METHOD_NAMES = {
    "rates": "lrs_at",
    "plan": "plan_lrs",
    "follow": "set_lr_from_plan",
    "adopt": "reinitialize_from",
    "stopping": "freezing_params",
    "rests": "params_frozen",
    "state": "state_dict",
    "load": "load_state_dict",
}  # of Optimizer; a plug-in may call or override these
OPTIMIZER_METHODS = (*OLD_METHOD_NAMES.values(), "step", "zero_grad", "compile")  # what a training calls


class Optimizer:
    """Applies the rules of its groups. `schedule` (progress -> multiplier of lr) is constant until it is set."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old, new in OLD_METHOD_NAMES.items():
            if old in vars(cls) and new not in vars(cls):
                setattr(cls, new, vars(cls)[old])

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = [group for group in groups if group.params]
        if not self.groups:
            raise UserError("an optimizer needs a group with parameters, and this one has none")
        self.schedule: Schedule = lambda progress: 1.0
        first = self.groups[0].params[0].detach()
        self._lrs = first.new_zeros(len(self.groups), dtype=torch.promote_types(first.dtype.to_real(), torch.float32))
        self._has_complex = any(p.is_complex() for group in self.groups for p in group.params)
        self._lr_plan = self._lrs[None].clone()  # (steps, groups): the lr of the coming steps
        self._hyper: list[dict[str, Tensor]] = []
        self._state: list[dict[str, list[Tensor]]] = []
        for group, lr in zip(self.groups, self._lrs, strict=True):
            scalars = {name: torch.full_like(lr, value) for name, value in group.hyper.items()}
            self._hyper.append(scalars | {"lr": lr})  # a view of self._lrs, so that one copy sets the lr of all groups
            state = {name: [torch.zeros_like(_view_as_real(p)) for p in group.params] for name in group.state_names}
            self._state.append(state | {name: [torch.zeros_like(lr)] for name in group.counters})
        self._apply_rule: Callable[..., None] = _apply_rule
        self.set_progress(0.0)

    def compile(self) -> None:
        """Fuse each rule into few kernels (torch.compile)."""
        self._apply_rule = torch.compile(_apply_rule)

    def lrs_at(self, progress: float) -> list[float]:
        """The lr of each group at `progress`, the fraction of all steps that are done."""
        multiplier = check_multiplier(self.schedule(progress), progress)
        return [group.hyper["lr"] * _group_multiplier(group, progress, multiplier) for group in self.groups]

    def set_progress(self, progress: float) -> None:
        """Set every lr to its value at `progress`. For use before each step where `plan_lrs` has not been called."""
        self._lrs.copy_(torch.tensor(self.lrs_at(progress), dtype=self._lrs.dtype))

    def plan_lrs(self, progress: Sequence[float]) -> None:
        """Copy the lr of the coming steps to the device, so that `set_lr_from_plan` needs nothing from the host."""
        table = torch.tensor([self.lrs_at(each) for each in progress], dtype=self._lrs.dtype)
        if self._lr_plan.shape == table.shape:
            source = table.pin_memory() if self._lr_plan.is_cuda else table  # a copy from pinned memory does not wait
            self._lr_plan.copy_(source, non_blocking=self._lr_plan.is_cuda)  # in place: a captured step reads it
        else:
            self._lr_plan = table.to(self._lrs.device)

    def set_lr_from_plan(self, step_index: Tensor) -> None:
        """Set every lr to row `step_index` (1,) of the plan."""
        torch.index_select(self._lr_plan, 0, step_index, out=self._lrs.unsqueeze(0))

    def reinitialize_from(self, other: Optimizer) -> bool:
        """Copy the scalars and the schedule of `other`, built for the same parameters, in place, and reset all state.

        Returns False, unchanged, if the two differ in more than that.
        """
        if type(self) is not Optimizer or type(other) is not Optimizer:
            return False  # a subclass may hold more than is copied here
        if [_group_structure(group) for group in self.groups] != [_group_structure(group) for group in other.groups]:
            return False
        self.groups, self.schedule = [*other.groups], other.schedule
        for ours, theirs in zip(self._hyper, other._hyper, strict=True):
            for name, scalar in ours.items():
                scalar.copy_(theirs[name])
        for tensor in self.state_dict().values():
            tensor.zero_()
        return True

    @property
    def freezing_params(self) -> list[Tensor]:
        """The parameters with `freeze_after` < 1. Empty if all are like that, as a backward pass needs one that learns."""
        if all(group.freeze_after < 1 for group in self.groups):
            return []
        return [parameter for group in self.groups if group.freeze_after < 1 for parameter in group.params]

    def params_frozen(self, progress: float) -> bool:
        """Whether there are `freezing_params` and all of them have stopped learning, so that they need no gradients."""
        return bool(self.freezing_params) and all(
            progress >= group.freeze_after for group in self.groups if group.freeze_after < 1
        )

    @property
    def lr(self) -> float:
        """The first group's present lr. Waits for the device."""
        return float(self._lrs[0])

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group, state, hyper in zip(self.groups, self._state, self._hyper, strict=True):
            indices = [index for index, p in enumerate(group.params) if p.grad is not None]
            if indices:
                params = [group.params[index] for index in indices]
                grads = [p.grad for p in params if p.grad is not None]
                if self._has_complex:  # rules are of real numbers
                    params, grads = [_view_as_real(p) for p in params], [_view_as_real(grad) for grad in grads]
                selected = {name: [state[name][index] for index in indices] for name in group.state_names}
                self._apply_rule(group.rule, params, grads, selected | {name: state[name] for name in group.counters}, hyper)

    def zero_grad(self) -> None:
        for group in self.groups:
            for p in group.params:
                p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All that steps have changed. These are live tensors, as in torch's state_dict: clone what has to stay."""
        tensors: dict[str, Tensor] = {}
        for index, (group, state) in enumerate(zip(self.groups, self._state, strict=True)):
            for name in group.state_names:
                tensors |= {f"{owner}/{name}": value for owner, value in zip(group.names, state[name], strict=True)}
            tensors |= {f"group{index}/{name}": state[name][0] for name in group.counters}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Copy a `state_dict()` of the same optimizer, in place."""
        tensors = self.state_dict()
        assert tensors.keys() == saved.keys(), f"another optimizer's state: {sorted(tensors.keys() ^ saved.keys())[:4]}"
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])

    # Old names, for plug-ins.
    rates, plan, follow, adopt = lrs_at, plan_lrs, set_lr_from_plan, reinitialize_from
    stopping, rests, state, load = freezing_params, params_frozen, state_dict, load_state_dict


def check_multiplier(value: Any, progress: float) -> float:
    """What a schedule has returned, as a float. Raises UserError unless it is a number of 0 or more, and finite."""
    if type(value) is float and 0 <= value < math.inf:
        return value
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if not isinstance(value, bool | str | bytes) and 0 <= float(value) < math.inf:
            return float(value)
    raise UserError(
        f"the schedule gives {str(value)[:60]!r} at {100 * progress:.4g} % of the training; "
        "it has to give what lr is multiplied by, a number of 0 or more"
    )


def _view_as_real(tensor: Tensor) -> Tensor:
    """A detached view: (..., 2) of a complex tensor, else the tensor itself."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def _group_multiplier(group: Group, progress: float, multiplier: float) -> float:
    """What the group's base lr is multiplied by. `multiplier` is the schedule's."""
    if group.freeze_after >= 1:
        return multiplier
    return max(0.0, 1 - progress / group.freeze_after) if group.freeze_after > 0 else 0.0


def _apply_rule(rule: Rule, *arguments: Any) -> None:
    rule(*arguments)


def _group_structure(group: Group) -> tuple[Any, ...]:
    """Two groups with an equal structure differ at most in the values of their scalars."""
    rule: Any = group.rule
    if isinstance(rule, functools.partial):
        rule = rule.func, rule.args, rule.keywords
    tensors = [id(p) for p in group.params]
    return rule, list(group.names), tensors, sorted(group.hyper), group.state_names, group.counters, group.freeze_after < 1
