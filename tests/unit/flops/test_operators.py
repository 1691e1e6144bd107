"""The lists of operators against what PyTorch says of its own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from cifar.flops.operators import FREE, OUR_FORMULAS, Kind, find_formula, find_kind

aten = torch.ops.aten
CONTRACTS = re.compile(
    r"(^|_)(mm|bmm|addmm|baddbmm|mv|dot|vdot|matmul|conv\w*|fft\w*|rnn|lstm|gru|einsum|attention|cdist|pdist)(_|$)"
)
LINEAR_ALGEBRA = {"linalg_vector_norm", "linalg_cross", "linalg__powsum"}  # the only ones that are known
IS_OLD = torch.__version__ < "2.15"
NEWER = {"_upsample_lanczos2d_aa", "shallow_copy_data_"} if IS_OLD else set()  # operators that torch 2.11 does not have
UNTAGGED = {"_conj_physical", "leaky_relu"} if IS_OLD else set()  # there, these have no tag
UNKNOWN_VIEWS = re.compile(r"^(_?nested|_test|_?sparse|_?indices|_?values|_make_dual|c?col_|c?row_|crow_|ccol_)")


def packets() -> list[Any]:
    """All operators of aten."""
    names = {
        name.removeprefix("aten::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::")
    }
    return [getattr(aten, name) for name in sorted(names) if hasattr(aten, name)]


PACKETS = packets()
# It lives as long as the process: torch 2.11 compiles nothing any more once an operator is gone.
LIBRARY = torch.library.Library("zoo_operators", "DEF")
LIBRARY.define("add(Tensor x) -> Tensor")


def overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


def test_every_listed_operator_exists() -> None:
    assert set(FREE) - {packet.__name__ for packet in PACKETS} <= NEWER


def test_none_of_them_contracts() -> None:
    for name in FREE:
        assert find_formula(getattr(aten, name, aten.add)) is None, name
        assert not CONTRACTS.search(name) or name.endswith("fftfreq"), name
        assert not name.startswith("linalg_") or name in LINEAR_ALGEBRA, name


def test_every_pointwise_operator_of_pytorchs_is_known_as_one() -> None:
    allowed = {Kind.POINTWISE, Kind.PRODUCT, Kind.REDUCING, Kind.SHAPE, Kind.ASKING}  # max, clone and equal have the tag too
    for packet in PACKETS:
        if any(torch.Tag.pointwise in overload.tags for overload in overloads(packet)) and "backward" not in packet.__name__:
            assert find_kind(packet) in allowed, packet.__name__


def test_what_we_call_pointwise_has_the_tag_or_is_a_form_of_one_that_has_it() -> None:
    tagged = {p.__name__ for p in PACKETS if any(torch.Tag.pointwise in overload.tags for overload in overloads(p))}
    others = {name for name, kind in FREE.items() if kind in (Kind.POINTWISE, Kind.PRODUCT)} - tagged
    assert others - UNTAGGED <= {
        "__and__", "__or__", "__irshift__", "_add_relu", "_fused_dropout", "_masked_scale", "_prelu_kernel", "addr", "complex",
        "fake_quantize_per_channel_affine_cachemask", "fake_quantize_per_tensor_affine_cachemask",
        "_fake_quantize_learnable_per_channel_affine", "_fake_quantize_learnable_per_tensor_affine",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "_fused_moving_avg_obs_fq_helper", "floor_divide", "glu",
        "hardswish", "isin", "linalg_cross", "log_sigmoid_forward", "native_dropout", "polar", "rrelu_with_noise",
        "rrelu_with_noise_functional",
    }  # fmt: skip


def test_every_view_is_a_change_of_shape() -> None:
    for packet in PACKETS:
        name = packet.__name__
        if (
            any(overload.is_view for overload in overloads(packet))
            and find_kind(packet) is not None
            and not UNKNOWN_VIEWS.search(name)
        ):
            assert find_kind(packet) is Kind.SHAPE or name == "positive", name


@pytest.mark.parametrize(
    "name", ["add_", "mul_", "relu_", "fill_", "copy_", "view_copy", "_foreach_mul", "_foreach_add_", "index_copy_"]
)
def test_forms_of_an_operator_are_of_its_kind(name: str) -> None:
    base = name.removeprefix("_foreach_").rstrip("_")
    base = {"view_copy": "view"}.get(name, base)
    assert find_kind(getattr(aten, name)) is find_kind(getattr(aten, base)) is not None


@pytest.mark.parametrize(
    "name", ["_fft_r2c", "_cdist_forward", "grid_sampler_2d", "linalg_matrix_exp", "_linalg_svd", "_sparse_addmm"]
)
def test_what_has_no_formula_is_unknown(name: str) -> None:
    assert find_kind(getattr(aten, name)) is None and find_formula(getattr(aten, name)) is None


def test_an_operator_of_another_library_is_unknown_whatever_its_name() -> None:
    assert find_kind(torch.ops.zoo_operators.add) is None


def test_formulas_of_ours() -> None:
    matrix, vector = torch.zeros(5, 7), torch.zeros(7)
    assert find_formula(aten.mv)((matrix, vector), {}, matrix @ vector) == 35
    assert find_formula(aten.dot)((vector, vector), {}, vector @ vector) == 7
    assert find_formula(aten.addmv_)((torch.zeros(5), matrix, vector), {}, None) == 35
    first, second = torch.zeros(3, 5, 7), torch.zeros(3, 7, 2)
    assert find_formula(aten.addbmm)((torch.zeros(5, 2), first, second), {}, None) == 3 * 5 * 7 * 2
    assert find_formula(aten.addmm_)((torch.zeros(5, 2), matrix, second[0]), {}, torch.zeros(5, 2)) == 5 * 7 * 2
    assert set(OUR_FORMULAS).isdisjoint(torch.utils.flop_counter.flop_registry)


def test_the_formula_of_bilinear_is_that_of_its_loops() -> None:
    batch, left, right, outputs = 3, 4, 5, 6
    module = nn.Bilinear(left, right, outputs)
    loops = sum(1 for _ in range(batch * outputs * left * right)) + sum(1 for _ in range(batch * outputs * right))
    arguments = (torch.zeros(batch, left), module.weight, torch.zeros(batch, right), [1, 3], [0], [1, 2], [2, 3])
    assert find_formula(aten._trilinear)(arguments, {}, None) == loops
