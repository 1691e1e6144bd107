"""What a model costs: multiply-adds, parameters, activations, layer by layer. The only package that imports thop.

The convention: `macs` are the multiply-adds of convolutions, of linear, bilinear and recurrent layers, and of all other matrix
products, in one forward pass of one 3x32x32 image; `flops` = 2 macs. `activations` are the elements that convolutions and
linear layers put out (pycls: Radosavovic et al. 2020, arXiv:2003.13678). thop's operations of normalisation layers are
counted separately, as `norm_ops`; pooling, softmax, interpolation and element-wise functions are left out.

Two counters watch the pass: one what the network calls, by thop's rules (calls.py); one the operators that really ran
(dispatch.py), by their formulas (operators.py). Where they disagree in any module, where an operator is unknown, or where a
product hides in another form (disguised.py), the cost is not `verified` and `note` says where to look.
"""

from thop.profile import register_hooks  # type: ignore[import-untyped, unused-ignore]

from cifar.flops.cost import Cost, LayerCost, measure_cost
from cifar.flops.networks import keep_random_state, materialize_lazy_modules
from cifar.flops.timing import measure_microseconds_per_image

__all__ = [
    "Cost",
    "LayerCost",
    "keep_random_state",
    "materialize_lazy_modules",
    "measure_cost",
    "measure_microseconds_per_image",
    "register_hooks",
]
