"""What each operator of PyTorch is: one that contracts, with a formula for its multiply-adds, or one that has none to count.

An operator that contracts sums products along a dimension: convolutions, matrix products, recurrences. Those have torch's own
formulas (`torch.utils.flop_counter`), or one of OUR_FORMULAS. FREE has the other operators that are known: nothing is counted
for them. What is in neither is unknown, and a network that runs it is not verified: FFT, sparse products, `cdist`,
`grid_sample`, decompositions, everything outside of `aten`.

A test compares FREE with what PyTorch says about its operators (tags, views).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import torch


class _LazyJITFunction(type):
    """A class in the place of Triton's JITFunction, whose instances are that one's. It does not import Triton."""

    def __instancecheck__(cls, instance: object) -> bool:
        theirs = getattr(sys.modules.get("triton.runtime.jit"), "JITFunction", cls)
        return theirs is not cls and isinstance(instance, theirs)


@contextmanager
def _spare_triton_import() -> Iterator[None]:
    """Keep torch's formulas from importing Triton, which takes each process a fifth of a second.

    They import it for one class only: `register_flop_formula` takes instances of it.
    """
    name = "triton.runtime.jit"
    if "triton" in sys.modules:
        yield
        return
    stand_in: Any = ModuleType(name)
    stand_in.JITFunction = _LazyJITFunction("JITFunction", (), {})
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


with _spare_triton_import():
    from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class Kind(Enum):
    """What an operator does with its operands, as far as counting needs it."""

    POINTWISE = "pointwise"
    PRODUCT = "pointwise product"  # of two tensors, element by element
    NORMALISING = "normalising"
    AVERAGING = "reducing by adding up"
    REDUCING = "reducing in another way"
    POOLING = "pooling"
    RESAMPLING = "resampling"  # interpolation on a fixed grid
    SHAPE = "shape"  # views, copies, padding, joining
    INDEXING = "indexing"
    CREATING = "creating"  # constants and random numbers
    ASKING = "asking"  # for a number, a size or a property


_NAMES = {
    Kind.POINTWISE: """
        __and__ __ilshift__ __irshift__ __ixor__ __lshift__ __or__ __rshift__ __xor__ _add_relu _conj_physical
        _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fused_dropout _fused_moving_avg_obs_fq_helper
        _masked_scale _prelu_kernel abs acos acosh add angle asin asinh atan atan2 atanh bitwise_and
        bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min
        clip complex conj_physical copysign cos cosh deg2rad digamma elu eq erf erfc erfinv exp exp2 expm1
        fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine_cachemask float_power floor
        floor_divide fmax fmin fmod frac frexp gcd ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh heaviside
        hypot i0 igamma igammac isfinite isin isinf isnan isneginf isposinf lcm ldexp le leaky_relu lgamma log log10
        log1p log2 log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt
        masked_fill maximum minimum mish mvlgamma nan_to_num native_dropout ne neg nextafter polar polygamma positive
        pow rad2deg reciprocal relu relu6 remainder round rrelu rrelu_with_noise rrelu_with_noise_functional rsqrt
        rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink special_airy_ai special_bessel_j0
        special_bessel_j1 special_bessel_y0 special_bessel_y1 special_chebyshev_polynomial_t
        special_chebyshev_polynomial_u special_chebyshev_polynomial_v special_chebyshev_polynomial_w special_entr
        special_erfcx special_hermite_polynomial_h special_hermite_polynomial_he special_i0e special_i1 special_i1e
        special_laguerre_polynomial_l special_legendre_polynomial_p special_log_ndtr special_modified_bessel_i0
        special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri
        special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
        special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
        special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 special_xlog1py special_zeta sqrt square
        sub tan tanh threshold trunc where xlogy
    """,
    Kind.PRODUCT: "addcdiv addcmul addr div lerp linalg_cross mul true_divide",
    Kind.NORMALISING: """
        _batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional _fused_rms_norm _log_softmax
        _masked_softmax _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training _safe_softmax _softmax _weight_norm_interface batch_norm_elemt
        batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats
        cudnn_batch_norm embedding_renorm log_softmax miopen_batch_norm native_batch_norm native_group_norm
        native_layer_norm renorm softmax
    """,
    Kind.AVERAGING: """
        _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        avg_pool1d avg_pool2d avg_pool3d col2im cumsum index_add index_reduce linalg_vector_norm mean mkldnn_adaptive_avg_pool2d
        nansum native_norm norm scatter_add scatter_reduce segment_reduce sum trace
    """,
    Kind.REDUCING: """
        _aminmax _cummax_helper _cummin_helper _is_all_true _is_any_true _logcumsumexp _unique _unique2 all amax amin
        aminmax any argmax argmin argsort binary_cross_entropy binary_cross_entropy_with_logits bincount bucketize
        count_nonzero cummax cummin cumprod dist histc histogram huber_loss kthvalue linalg__powsum logcumsumexp
        logsumexp max median min mode mse_loss multi_margin_loss multilabel_margin_loss_forward nanmedian
        nll_loss2d_forward nll_loss_forward prod searchsorted smooth_l1_loss soft_margin_loss sort std std_mean topk
        unique_consecutive unique_dim unique_dim_consecutive var var_mean
    """,
    Kind.POOLING: """
        adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d max_pool2d_with_indices
        max_pool3d_with_indices max_unpool2d max_unpool3d mkldnn_max_pool2d mkldnn_max_pool3d
    """,
    Kind.RESAMPLING: """
        _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_lanczos2d_aa _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_bicubic2d upsample_bilinear2d upsample_linear1d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    """,
    Kind.SHAPE: """
        _chunk_cat _conj _copy_from _copy_from_and_resize _fw_primal _lazy_clone _neg_view _pack_padded_sequence
        _pin_memory _reshape_alias _reshape_copy _resize_output _stack _to_copy _unsafe_view alias as_strided
        as_strided_scatter block_diag cat channel_shuffle clone constant_pad_nd copy detach diag_embed diagonal
        diagonal_scatter expand flip im2col lift lift_fresh mH mT matrix_H narrow native_channel_shuffle numpy_T
        permute pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat
        replication_pad1d replication_pad2d replication_pad3d resize resize_as roll rot90 select select_scatter set
        shallow_copy_data_ slice slice_inverse slice_scatter split split_with_sizes squeeze stack t to transpose tril
        triu unbind unfold unsafe_split unsafe_split_with_sizes unsqueeze view view_as_complex view_as_real
    """,
    Kind.INDEXING: """
        _embedding_bag _embedding_bag_forward_only _index_put_impl _unsafe_index _unsafe_index_put
        _unsafe_masked_index _unsafe_masked_index_put_accumulate embedding gather index index_copy index_fill
        index_put index_select masked_scatter masked_select nonzero nonzero_static put repeat_interleave
        scatter take
    """,
    Kind.CREATING: """
        _efficientzerotensor _new_zeros_with_same_feature_meta _sample_dirichlet _standard_gamma arange
        bartlett_window bernoulli binomial blackman_window cauchy empty empty_like empty_permuted empty_strided
        exponential eye fft_fftfreq fft_rfftfreq fill full full_like geometric hamming_window hann_window
        kaiser_window linspace log_normal logspace multinomial new_empty new_empty_strided new_full new_ones new_zeros
        normal normal_functional ones ones_like poisson rand rand_like randint randint_like randn randn_like random
        randperm range scalar_tensor tril_indices triu_indices uniform zero zeros zeros_like
    """,
    Kind.ASKING: """
        _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _functional_assert_scalar
        _has_same_storage_numel _local_scalar_dense _print allclose equal is_pinned is_same_size is_set_to size stride
        sym_constrain_range sym_constrain_range_for_size sym_size sym_stride
    """,
}
FREE = {name: kind for kind, names in _NAMES.items() for name in names.split()}  # names of operators of aten
FREE_ELSEWHERE = {"prim::device", "prim::layout", "profiler::_record_function_enter_new", "profiler::_record_function_exit"}


def find_kind(packet: Any) -> Kind | None:
    """The kind of an operator for which nothing is counted; None for one that contracts or is unknown.

    `packet`: all overloads of an operator, as `torch.ops.aten.add`. In-place, copying and for-each forms are as their base.
    """
    namespace, _, name = str(packet._qualified_op_name).partition("::")
    if namespace != "aten":
        return Kind.ASKING if f"{namespace}::{name}" in FREE_ELSEWHERE else None
    name = name.removeprefix("_foreach_")
    if name not in FREE and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name not in FREE:
        name = name.removesuffix("_copy")
    return FREE.get(name)


def multiplies_weights(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a known operator contracts with these arguments: an embedding bag with weights is a matrix product."""
    if packet not in (aten._embedding_bag, aten._embedding_bag_forward_only):
        return False
    return kwargs.get("per_sample_weights", args[6] if len(args) > 6 else None) is not None


# -- formulas ----------------------------------------------------------------------------------------------------------
# Each takes the operator's arguments and its result, and gives multiply-adds.

Formula = Callable[..., int]


def _count_mv(matrix: Any, *_: Any, **__: Any) -> int:
    """(n, k) by (k): n k. Also the dot product: (k) by (k)."""
    return int(matrix.numel())


def _count_addmv(_: Any, matrix: Any, *__: Any, **___: Any) -> int:
    return int(matrix.numel())


def _count_addbmm(_: Any, first: Any, second: Any, *__: Any, **___: Any) -> int:
    """(b, n, k) by (b, k, m), summed over b: b n k m."""
    return int(first.numel() * second.shape[-1])


def _count_trilinear(
    first: Any, second: Any, third: Any, expand1: Any, expand2: Any, expand3: Any, sumdim: Any, *_: Any, **__: Any
) -> int:
    """What `nn.Bilinear` runs: the first two are multiplied and summed as far as the third does not need it; then the third.

    (B, o, i, j) of nn.Bilinear: x (B, i) by weight (o, i, j) is B o i j, by y (B, j) is B o j.
    """

    def expand(tensor: Any, places: Any) -> list[int]:
        shape = list(tensor.shape)
        for place in sorted(places):
            shape.insert(place, 1)
        return shape

    shapes = [expand(t, p) for t, p in ((first, expand1), (second, expand2), (third, expand3))]
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    summed_first = [dim for dim in sumdim if shapes[2][dim] == 1]
    pair = [max(a, b) for a, b in zip(shapes[0], shapes[1], strict=True)]
    rest = [1 if dim in summed_first else size for dim, size in enumerate(full)]
    return math.prod(pair) + math.prod(rest)


def _count_mkldnn_rnn_layer(sequence: Any, input_weight: Any, hidden_weight: Any, *_: Any, **__: Any) -> int:
    """A layer of an LSTM in one direction; the sequence is (steps, batch, features)."""
    steps, batch = sequence.shape[:2]
    return int(steps * batch * (input_weight.numel() + hidden_weight.numel()))


OUR_FORMULAS: dict[Any, Formula] = {
    aten.mv: _count_mv,
    aten.dot: _count_mv,
    aten.vdot: _count_mv,
    aten.addmv: _count_addmv,
    aten.addbmm: _count_addbmm,
    aten._trilinear: _count_trilinear,
    aten.mkldnn_rnn_layer: _count_mkldnn_rnn_layer,
}


def find_formula(packet: Any) -> Formula | None:
    """The formula of an operator that contracts: (arguments, keyword arguments, result) -> multiply-adds. None for any other.

    In-place forms have the formula of their base.
    """
    name = str(packet.__name__)
    if packet not in flop_registry and packet not in OUR_FORMULAS and name.endswith("_"):
        packet = getattr(aten, name[:-1], packet)
    if ours := OUR_FORMULAS.get(packet):
        return lambda args, kwargs, result: ours(*args, **kwargs)
    if theirs := flop_registry.get(packet):
        return lambda args, kwargs, result: int(theirs(*args, **kwargs, out_val=result)) // 2
    return None
