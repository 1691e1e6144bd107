"""Optimizers and learning-rate schedules. A file here, or in a plug-in directory's optim/, registers one or more by name."""

from cifar.optim.optimizer import Group, Momentum, Optimizer, Parameters, Rate, Rule, Share
from cifar.optim.parameter_roles import find_roles

roles = find_roles  # old name, for plug-ins

__all__ = ["Group", "Momentum", "Optimizer", "Parameters", "Rate", "Rule", "Share", "find_roles", "roles"]
