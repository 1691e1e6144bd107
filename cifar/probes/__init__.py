"""Probes: measurements of gradients and weights during training. A file here, or in a plug-in's probes/, registers them."""

from cifar.probes.base import Probe, ProbeRunner, Watcher, collect_gradients, gradients, weight_layers

__all__ = ["Probe", "ProbeRunner", "Watcher", "collect_gradients", "gradients", "weight_layers"]
