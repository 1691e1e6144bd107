"""Products that are no operator of their own: a pointwise product of two tensors, whose elements are then added up.

`(x.unsqueeze(-1) * w).sum(1)` is a matrix product, but PyTorch runs a `mul` and a `sum`. The multiply-adds of pointwise
products are not counted, as they are few: one an element. Two things tell a product in disguise from gating, layer scale and
the like:

- The product has more elements than there are different values from the image in it: the image's values were repeated, by
  broadcasting, `expand`, `repeat` or `unfold`, to meet several weights each. So have squares of such differences (distances).
- All products that are then summed have together more than MAX_SHARE of the multiply-adds that were counted.

Some networks replace the product or the sum: |x - w| (AdderNet), a choice by a weight's sign, a maximum in place of the sum.
Such pairs count for MAX_SHARE, as far as the image's values were repeated to meet several weights.

The image's values are followed through all operators, by the memory that they lie in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cifar.flops.operators import Kind

MAX_SHARE = 0.1  # of the multiply-adds that were counted, for pointwise products that are then summed
KEEP_SUMS = {"add", "neg", "rsub", "sub"}  # pointwise operators that keep a product a product
ADDED_PRODUCTS = {"addcdiv", "addcmul", "addr"}  # a product that is added to their first argument
INDEXED_SUMS = {
    *("_embedding_bag", "_embedding_bag_forward_only", "_index_put_impl", "_unsafe_index_put", "index_put", "put", "scatter"),
    "_unsafe_masked_index_put_accumulate",
}  # as far as their result is smaller than what is put into it
LOSSES = {"binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "mse_loss", "smooth_l1_loss"}
SCATTERED_SUMS = {"cumsum", "index_add", "scatter_add", "scatter_reduce", "index_reduce", "segment_reduce"}  # of any size
SQUARES = {"pow", "square", "linalg_vector_norm", "norm"}


@dataclass(frozen=True)
class Origin:
    """What is known of the values in a piece of memory that come from the image."""

    num_values: int  # different values, at most
    product_size: int = 0  # elements of the pointwise product that they are; 0 if they are none
    is_expanded: bool = False  # the product has more elements than it has values of the image
    is_weighted: bool = False  # the product is of the image's values with others
    is_spread: bool = False  # differences (or sums) of the image's values, each from several others
    num_pairs: int = 0  # the image's values, each combined with several others in a way that is no product
    is_bent: bool = False  # these pairs are no linear function of the image's values, so that a sum of them is no short one


@dataclass(frozen=True)
class Step:
    """One operator that ran. `kind` is None for one that contracts."""

    kind: Kind | None
    name: str  # without the underscore of in-place forms
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    writes: bool  # into one of its inputs


class ProductTracker:
    """Follows the image's values through the operators of a forward pass, and notes sums of pointwise products."""

    def __init__(self, image: Tensor, constants: Sequence[Tensor] = ()) -> None:
        """`constants`: the network's parameters and buffers."""
        self.met_stranger = False  # a tensor that no operator made, and that is no constant of the network
        self.expanded_product = ""  # the first expanded product that was summed: its operator, and the shapes of its factors
        self.num_summed_products = 0  # multiply-adds of all pointwise products that were summed
        self.num_reduced_pairs = 0  # other operations on pairs, whose results were reduced to fewer numbers
        self._origins: dict[int, tuple[Any, Origin]] = {}  # place in memory -> (weak reference to it, origin)
        self._factors: dict[int, str] = {}  # size of an expanded product -> what made it
        self._set(image, Origin(image.numel()))
        for constant in constants:
            self._set(constant, Origin(0))

    def comes_from_image(self, tensor: Tensor) -> bool:
        origin = self._get(tensor)
        return origin is not None and origin.num_values > 0

    def follow(self, step: Step) -> None:
        if step.kind is Kind.ASKING or "empty" in step.name:
            return
        found = [self._get(tensor) for tensor in step.inputs]
        if not step.writes and any(o is None and t.numel() > 1 for o, t in zip(found, step.inputs, strict=True)):
            self.met_stranger = True
        origins = [origin for origin in found if origin and origin.num_values]
        takes_shape = step.kind is Kind.CREATING and step.name.startswith(("new_", "zeros", "ones", "full", "rand"))
        places = {tensor.untyped_storage()._cdata for tensor in step.inputs if tensor.layout is torch.strided}
        for output in step.outputs:
            origin = self._derive(step, origins, output.numel()) if origins and not takes_shape else Origin(0)
            if output.layout is torch.strided and output.untyped_storage()._cdata in places:
                if not step.writes:
                    continue  # a view: its memory's origin is known
                origin = self._join(output, origin)
            self._set(output, origin)

    def _derive(self, step: Step, origins: Sequence[Origin], size: int) -> Origin:
        """The origin of an output of `size` elements. `origins`: of those inputs that have one."""
        total, most = sum(o.num_values for o in origins), max(o.num_values for o in origins)
        product = max(origins, key=lambda o: (o.is_expanded, o.product_size, o.num_pairs))
        carried = replace(product, num_values=min(size, most))
        if step.name in SQUARES and any(o.is_spread for o in origins):
            carried = replace(carried, product_size=step.inputs[0].numel(), is_expanded=True)
        is_smaller = size < max(tensor.numel() for tensor in step.inputs)
        if step.kind is None:
            return Origin(size)
        if step.kind is Kind.RESAMPLING:
            if is_smaller:
                self._note_sum(carried)
            return Origin(size)
        if step.kind in (Kind.SHAPE, Kind.INDEXING):
            if is_smaller and step.name in INDEXED_SUMS:
                self._note_sum(carried)
            return replace(product, num_values=min(size, total))
        if step.kind is Kind.AVERAGING:
            if size < step.inputs[0].numel() or step.name in SCATTERED_SUMS:
                self._note_sum(carried)
            return Origin(min(size, most))
        if step.kind in (Kind.REDUCING, Kind.POOLING) and step.name not in LOSSES:
            if is_smaller:
                self._note_reduction(carried)
            return carried
        if step.kind is Kind.NORMALISING:
            self._note_reduction(carried, is_product_only=True)
        return self._combine(step, origins, carried, size)

    def _combine(self, step: Step, origins: Sequence[Origin], carried: Origin, size: int) -> Origin:
        """The origin of what a pointwise operator puts out. `carried`: that of the most remarkable input."""
        most = max(o.num_values for o in origins)
        factors = [tensor for tensor in step.inputs if tensor.numel() > 1]
        is_square = len(factors) > 1 and all(tensor is factors[0] for tensor in factors)
        if is_square and any(o.is_spread for o in origins):
            carried = replace(carried, product_size=step.inputs[0].numel(), is_expanded=True)
        elif len(factors) > 1 and not is_square and size > 1:
            shapes = " and ".join("×".join(map(str, tensor.shape)) for tensor in factors)
            self._factors[size] = f"aten.{step.name} of {shapes}"
            if step.kind is Kind.PRODUCT:
                if step.name in ADDED_PRODUCTS and any(o.product_size >= size for o in origins):
                    self.num_summed_products += size
                is_weighted = len(origins) < len(factors)
                return Origin(
                    min(size, most), size, size > most, is_weighted, num_pairs=carried.num_pairs, is_bent=carried.is_bent
                )
            if step.name in ("add", "sub") and sum(o.is_weighted and o.product_size > 0 for o in origins) > 1:
                self.num_summed_products += size
            if size > most:
                is_linear = step.name in KEEP_SUMS
                return replace(carried, is_spread=is_linear, num_pairs=size, is_bent=carried.is_bent or not is_linear)
        if any(o.num_values >= size and not o.product_size and not o.num_pairs for o in origins):
            return Origin(min(size, most))  # added to as many values of the image: no bare product any more
        is_linear = step.kind is Kind.PRODUCT or step.name in KEEP_SUMS
        if carried.num_pairs and not is_linear:
            carried = replace(carried, is_bent=True)
        return carried if carried.is_expanded or is_linear else replace(carried, product_size=0)

    def _note_sum(self, origin: Origin) -> None:
        self.num_summed_products += origin.product_size
        if origin.is_expanded and not self.expanded_product:
            self.expanded_product = self._factors.get(origin.product_size, "aten.pow of repeated values")
        elif origin.is_bent and not origin.product_size:
            self.num_reduced_pairs += origin.num_pairs

    def _note_reduction(self, origin: Origin, *, is_product_only: bool = False) -> None:
        """Of a maximum, a variance and the like, which are no sum of products but need as many operations."""
        if origin.is_expanded:
            self.num_reduced_pairs += origin.product_size
        elif not is_product_only:
            self.num_reduced_pairs += origin.num_pairs

    def _join(self, output: Tensor, origin: Origin) -> Origin:
        """The origin of memory that was partly written."""
        size = output.untyped_storage().nbytes() // output.element_size()
        before = self._get(output) or Origin(0)
        return replace(
            max(before, origin, key=lambda o: (o.is_expanded, o.product_size, o.num_pairs)),
            num_values=min(size, before.num_values + origin.num_values),
        )

    def _get(self, tensor: Tensor) -> Origin | None:
        if tensor.layout is not torch.strided:
            return None
        reference, origin = self._origins.get(tensor.untyped_storage()._cdata, (None, None))
        if reference is None or origin is None or reference.expired():
            return None
        return replace(origin, num_values=min(origin.num_values, tensor.numel()))

    def _set(self, tensor: Tensor, origin: Origin) -> None:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._origins[storage._cdata] = (StorageWeakRef(storage), origin)
