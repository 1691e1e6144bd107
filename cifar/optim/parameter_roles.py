"""The role of each parameter: which ones decay, and which ones an optimizer such as Muon treats in its own way.

Roles follow the type of the module that owns a parameter, not its number of dimensions. A normalisation never decays, even over
(C, H, W). Recurrent weights and the parts of a parametrised filter do. What no type tells is decided by its name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

DECAYING_ROLES = ("hidden", "stem", "head", "magnitude", "other")
NUM_CLASSES = 10  # of CIFAR-10: a layer with as many outputs is the head

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FILTERS = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)  # their weights multiply
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_LISTS = (nn.ParameterList, nn.ParameterDict)
_ADDED = re.compile(
    r"(?i)(^|_)(pos|position|positions|positional|posemb|cls|class|dist|token|tokens|embed|embeds|embedding|embeddings|emb|pe"
    r"|table|query|queries|prompt|prompts|register|registers|mask|anchor|anchors|codebook|prototypes?)(s?$|_|\d)"
)  # names of what is added or looked up
_SCALES = re.compile(r"(?i)(^|_)(scale|gamma|beta|alpha|temperature|temp|tau|gain|shift|offset|gate|slope|g|norm)s?(_|\d|$)")
_WEIGHTS = re.compile(r"weight|weight_(ih|hh|hr)(_l\d+)?(_reverse)?|(in|q|k|v)_proj_weight")  # of a module in _FILTERS
_BIASES = re.compile(r".*bias|bias_(ih|hh)(_l\d+)?(_reverse)?|.*bias_orig")
_PARAMETRISATION = re.compile(r"^(?:(?P<owner>.*)\.)?parametrizations\.(?P<tensor>\w+)\.original(?P<part>[01]?)$")
_OLD_PARAMETRISATION = re.compile(r"^(?P<tensor>.*weight.*)_(?P<part>g|v|orig)$")  # torch.nn.utils.weight_norm and its like


@dataclass(frozen=True)
class _Owned:
    """A parameter, and the module that it belongs to."""

    module: nn.Module
    path: str  # of the module
    tensor: str  # its name there: weight, bias, in_proj_weight, ...
    part: str = ""  # of a parametrised tensor: "direction" or "magnitude" of a weight norm, "whole"


def find_roles(model: nn.Module) -> dict[str, str]:
    """Name -> role of every parameter that trains. An attribute `model.roles` (name -> role) overrides what is found here.

    stem: the weight of the first convolution, unless it is frozen. head: the weight of the last linear layer or convolution
    with 10 outputs, else of the last linear layer. hidden: every other matrix or filter, recurrent ones too. magnitude: the
    lengths of filters under a weight norm. embedding: tokens, positions and tables, which are added or looked up and not
    multiplied with. norm: of normalisations, and what scales. bias: what is added. other: unclear, see `find_unclear`.
    """
    return {name: role for name, (role, _) in _decide_roles(model).items()}


def find_unclear(model: nn.Module) -> list[str]:
    """The parameters that no module's type and no name tells the role of, and that `model.roles` does not name."""
    return [name for name, (_, is_clear) in _decide_roles(model).items() if not is_clear]


def describe_unclear(model: nn.Module) -> str:
    """A sentence about the parameters whose role is unclear; "" if there are none."""
    unclear = find_unclear(model)
    if not unclear:
        return ""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    listed = ", ".join(f"'{name}' {shapes[name]}" for name in unclear[:3])
    listed += f" and {len(unclear) - 3} others" * (len(unclear) > 3)
    return (
        f"the role of {listed} is unclear: weights decay there, and Muon leaves them to SGD; "
        f"where that is wrong, set roles = {{'{unclear[0]}': 'hidden'}} (or 'embedding', 'norm') on the model"
    )


def _decide_roles(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Name -> (role, whether that is clear)."""
    modules = dict(model.named_modules())
    own = getattr(model, "roles", {})
    own = own if isinstance(own, Mapping) else {}
    stem, head = _find_stem(modules), _find_head(modules)
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owned = _find_owner(name, modules)
        role, is_clear = _role_by_type(owned, parameter)
        if role == "hidden" and owned.tensor == "weight" and owned.module in (stem, head):
            role = "head" if owned.module is head else "stem"
        found[name] = (own[name], True) if name in own else (role, is_clear)
    return found


def _find_stem(modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return next((module for module in modules.values() if isinstance(module, _CONVOLUTIONS)), None)


def _find_head(modules: Mapping[str, nn.Module]) -> nn.Module | None:
    linears = [module for module in modules.values() if isinstance(module, nn.Linear)]
    ends = [m for m in modules.values() if _num_outputs(m) == NUM_CLASSES]
    return ends[-1] if ends else linears[-1] if linears else None


def _num_outputs(module: nn.Module) -> int:
    if isinstance(module, nn.Linear | nn.Bilinear):
        return module.out_features
    return module.out_channels if isinstance(module, _CONVOLUTIONS) else 0


def _find_owner(name: str, modules: Mapping[str, nn.Module]) -> _Owned:
    """Whose parameter it is. Parametrisations and lists belong to the module that they are an attribute of."""
    if match := _PARAMETRISATION.match(name):
        path = match["owner"] or ""
        part = {"0": "magnitude", "1": "direction"}.get(match["part"], "whole")
        if part != "whole" and not _is_weight_norm(modules.get(name.rpartition(".")[0])):
            part = "whole"  # another parametrisation of several tensors
        return _Owned(modules[path], path, match["tensor"], part)
    path, _, leaf = name.rpartition(".")
    while isinstance(modules[path], _LISTS) and path:
        path, _, leaf = path.rpartition(".")
    if match := _OLD_PARAMETRISATION.match(leaf):
        part = {"g": "magnitude", "v": "direction"}.get(match["part"], "whole")
        return _Owned(modules[path], path, match["tensor"], part)
    return _Owned(modules[path], path, leaf)


def _is_weight_norm(parametrisations: nn.Module | None) -> bool:
    return any("WeightNorm" in type(module).__name__ for module in (parametrisations or nn.Module()).children())


def _role_by_type(owned: _Owned, parameter: Tensor) -> tuple[str, bool]:
    """(role, whether it is clear): by the module's type where that is known, else by the name and the shape."""
    module, leaf = owned.module, owned.tensor
    is_bias = bool(_BIASES.fullmatch(leaf))
    if isinstance(module, _NORMS) or (_is_named_norm(module) and not list(module.children())):
        return ("bias" if is_bias else "norm"), True
    if isinstance(module, _TABLES):
        return "embedding", True
    if isinstance(module, nn.PReLU):
        return "norm", True
    if isinstance(module, nn.MultiheadAttention) and leaf in ("bias_k", "bias_v"):
        return "embedding", True  # tokens that are appended
    if is_bias:
        return "bias", True
    if isinstance(module, _FILTERS) and _WEIGHTS.fullmatch(leaf):
        return ("magnitude" if owned.part == "magnitude" else "hidden"), True
    return _role_by_name(owned, parameter)


def _is_named_norm(module: nn.Module) -> bool:
    """Whether a module of somebody's own is a normalisation by its name, such as LayerNorm2d or GRN."""
    name = type(module).__name__.lower()
    is_torch = type(module).__module__.startswith("torch.nn")
    return not is_torch and ("norm" in name or name == "grn")


def _role_by_name(owned: _Owned, parameter: Tensor) -> tuple[str, bool]:
    """Of a bare nn.Parameter, on a module whose type says nothing."""
    leaf = owned.tensor
    if parameter.ndim <= 1:
        return "norm", True
    if owned.part == "magnitude":
        return "magnitude", True
    is_vector = sum(size > 1 for size in parameter.shape) <= 1  # (1, C, 1, 1)
    if leaf.endswith("weight") and not is_vector:
        return "hidden", True
    if _ADDED.search(leaf):
        return "embedding", True
    if is_vector or _SCALES.search(leaf):
        return "norm", True
    if parameter.shape[0] == 1:
        return "embedding", True  # (1, T, C): one for all images, so it is added to each
    return "other", False
