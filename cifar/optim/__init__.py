"""Optimizers: groups of named parameters, each with an update rule. schedules.py moves their lr.

A rule is a short function over lists of tensors that updates in place. Its scalars are 0-d tensors on the parameters'
device and it reads nothing on the host, so a step can be captured once as a CUDA graph and follow a moving lr after that.
Build an optimizer after the model has its device and memory format.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cifar.optim.schedules import Schedule

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # a learning rate or a decay
Momentum = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

Rule = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]], dict[str, Tensor]], None]
"""(parameters, their gradients, state by name, scalars by name) -> None. `hyper["lr"]` is already times the schedule.

What is fixed for good belongs into a functools.partial: two partials of one function with equal keywords are one rule, so
an optimizer whose other settings are all scalars can take over from another in place (`Optimizer.adopt`).
"""

_MODULES_WITH_FILTERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Parameters:
    """The parameters that train, by name, and what each is for: hidden, stem, head, norm, bias, embedding, or a model's own."""

    tensors: dict[str, Tensor]
    roles: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
        return cls({n: p for n, p in model.named_parameters() if p.requires_grad}, roles(model))

    def named(self, wanted: Iterable[str]) -> dict[str, Tensor]:
        """The parameters that have one of the wanted roles."""
        wanted = set(wanted)
        return {name: tensor for name, tensor in self.tensors.items() if self.roles[name] in wanted}

    def halves(self, decay_norm_and_bias: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(those that decay, those that do not). Filters and matrices do; norms, biases and embeddings where asked for."""
        decayed = self.tensors if decay_norm_and_bias else self.named(("hidden", "stem", "head"))
        return decayed, {name: tensor for name, tensor in self.tensors.items() if name not in decayed}


def roles(model: nn.Module) -> dict[str, str]:
    """Name -> role of every parameter that trains. `model.roles`, where there is one, has the last word.

    stem is the first convolution's weight (nothing, where that is frozen), head the last linear layer's, hidden every other
    matrix or filter; embedding are tokens, positions and tables: of two dimensions or more, but multiplied with nothing.
    """
    modules = dict(model.named_modules())
    convolutions = [f"{name}.weight".lstrip(".") for name, m in modules.items() if isinstance(m, _MODULES_WITH_FILTERS[1:])]
    linears = [f"{name}.weight".lstrip(".") for name, m in modules.items() if isinstance(m, nn.Linear)]
    special = dict.fromkeys(convolutions[:1], "stem") | dict.fromkeys(linears[-1:], "head")
    own: dict[str, str] = getattr(model, "roles", {})
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not parameter.requires_grad:
            continue
        if parameter.ndim >= 2:
            role = "hidden" if leaf.endswith("weight") and not isinstance(modules[owner], nn.Embedding) else "embedding"
        else:
            role = "bias" if leaf.endswith("bias") else "norm"
        found[name] = own.get(name, special.get(name, role))
    return found


@dataclass(frozen=True)
class Group:
    """Parameters that share a rule and its scalars. `state_names` are tensors like the parameters, `counters` are 0-d.

    hyper["lr"] is the base that the schedule multiplies. With `until` < 1 the group ignores the schedule: its lr falls
    linearly to zero at that share of training and stays there, where its rule has to leave the parameters as they are.
    """

    names: Sequence[str]
    params: Sequence[Tensor]
    rule: Rule
    hyper: dict[str, float]
    state_names: tuple[str, ...] = ()
    until: float = 1.0
    counters: tuple[str, ...] = ()


class Optimizer:
    """Groups at work. `schedule` (progress -> multiplier of lr) is constant until it is set."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = [group for group in groups if group.params]
        assert self.groups, "an optimizer needs parameters"
        self.schedule: Schedule = lambda progress: 1.0
        like = self.groups[0].params[0].detach()
        self._rates = like.new_zeros(len(self.groups), dtype=torch.promote_types(like.dtype, torch.float32))
        self._plan = self._rates[None].clone()  # (steps, groups): the lr of the steps to come
        self._hyper: list[dict[str, Tensor]] = []
        self._state: list[dict[str, list[Tensor]]] = []
        for group, rate in zip(self.groups, self._rates, strict=True):
            scalars = {name: torch.full_like(rate, value) for name, value in group.hyper.items()}
            self._hyper.append(scalars | {"lr": rate})  # a view: one copy moves the lr of all groups
            state = {name: [torch.zeros_like(p, requires_grad=False) for p in group.params] for name in group.state_names}
            self._state.append(state | {name: [torch.zeros_like(rate)] for name in group.counters})
        self._apply: Callable[..., None] = _apply
        self.set_progress(0.0)

    def compile(self) -> None:
        """Fuse each rule into few kernels (torch.compile)."""
        self._apply = torch.compile(_apply)

    def rates(self, progress: float) -> list[float]:
        """The lr of each group at `progress`, the share of all steps that are done."""
        multiplier = self.schedule(progress)
        found = []
        for group in self.groups:
            own = multiplier if group.until >= 1 else max(0.0, 1 - progress / group.until) if group.until > 0 else 0.0
            found.append(group.hyper["lr"] * own)
        return found

    def set_progress(self, progress: float) -> None:
        """Moves every lr to where it is at `progress`. Before each step, where nothing was planned."""
        self._rates.copy_(torch.tensor(self.rates(progress), dtype=self._rates.dtype))

    def plan(self, progress: Sequence[float]) -> None:
        """Puts the lr of the coming steps on the device, so that `follow` needs nothing from the host."""
        table = torch.tensor([self.rates(share) for share in progress], dtype=self._rates.dtype)
        if self._plan.shape == table.shape:
            pinned = table.pin_memory() if self._plan.is_cuda else table  # from there a copy waits for nothing
            self._plan.copy_(pinned, non_blocking=self._plan.is_cuda)  # in place: a captured step reads it
        else:
            self._plan = table.to(self._rates.device)

    def follow(self, at: Tensor) -> None:
        """Moves every lr to row `at` (1,) of the plan."""
        torch.index_select(self._plan, 0, at, out=self._rates.unsqueeze(0))

    def adopt(self, other: Optimizer) -> bool:
        """Take over the scalars and the schedule of another optimizer, built for the same parameters, and forget all steps.

        False, and nothing has changed, if the two differ in more than that.
        """
        if type(self) is not Optimizer or type(other) is not Optimizer:
            return False  # who knows what else it holds
        if [_structure(group) for group in self.groups] != [_structure(group) for group in other.groups]:
            return False
        self.groups, self.schedule = [*other.groups], other.schedule
        for ours, theirs in zip(self._hyper, other._hyper, strict=True):
            for name, scalar in ours.items():
                scalar.copy_(theirs[name])
        for tensor in self.state().values():
            tensor.zero_()
        return True

    @property
    def stopping(self) -> list[Tensor]:
        """The parameters that stop learning before the end; none where all do, as a backward pass needs one that learns."""
        if all(group.until < 1 for group in self.groups):
            return []
        return [parameter for group in self.groups if group.until < 1 for parameter in group.params]

    def rests(self, progress: float) -> bool:
        """Whether there are such and all have stopped: from there on they need no gradients."""
        return bool(self.stopping) and all(progress >= group.until for group in self.groups if group.until < 1)

    @property
    def lr(self) -> float:
        """Of the first group, now. Waits for the device."""
        return float(self._rates[0])

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters that have a gradient."""
        for group, state, hyper in zip(self.groups, self._state, self._hyper, strict=True):
            live = [index for index, p in enumerate(group.params) if p.grad is not None]
            if live:
                params = [group.params[index] for index in live]
                grads = [p.grad for p in params if p.grad is not None]
                kept = {name: [state[name][index] for index in live] for name in group.state_names}
                self._apply(group.rule, params, grads, kept | {name: state[name] for name in group.counters}, hyper)

    def zero_grad(self) -> None:
        for group in self.groups:
            for p in group.params:
                p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that steps have changed here: live tensors, as in torch's state_dict; clone what has to stay."""
        tensors: dict[str, Tensor] = {}
        for index, (group, state) in enumerate(zip(self.groups, self._state, strict=True)):
            for name in group.state_names:
                tensors |= {f"{owner}/{name}": value for owner, value in zip(group.names, state[name], strict=True)}
            tensors |= {f"group{index}/{name}": state[name][0] for name in group.counters}
        return tensors

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        """Copies a `state()` of the same optimizer in place."""
        ours = self.state()
        assert ours.keys() == saved.keys(), f"another optimizer's state: {sorted(ours.keys() ^ saved.keys())[:4]}"
        for name, tensor in ours.items():
            tensor.copy_(saved[name])


def _apply(rule: Rule, *arguments: Any) -> None:
    rule(*arguments)


def _structure(group: Group) -> tuple[Any, ...]:
    """What has to be equal for two groups to be one but for their scalars' values."""
    rule: Any = group.rule
    if isinstance(rule, functools.partial):
        rule = rule.func, rule.args, rule.keywords
    tensors = [id(p) for p in group.params]
    return rule, list(group.names), tensors, sorted(group.hyper), group.state_names, group.counters, group.until < 1
