"""Early stopping at a few epochs ("rungs", W&B's "bands"): there a trial goes on only if it is among the best 1/eta so far.

Successive halving after Li et al. 2018, "Hyperband" (JMLR 18), in the asynchronous form of W&B's `early_terminate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar.errors import UserError, did_you_mean
from cifar.system.files import shorten_repr

MAX_BANDS = 100  # as many as W&B's engine makes of `min_iter`
MAX_BANDS_FROM_ABOVE = 10_000  # of `max_iter` and `s`: more are a mistake in the file
_OPTIONS = ("type", "min_iter", "max_iter", "s", "eta", "strict")


@dataclass(frozen=True)
class Hyperband:
    """`min_iter` (bands at min_iter * eta^i) or `max_iter` with `s` (bands at max_iter / eta^i, i = 1..s)."""

    min_iter: int = 0
    max_iter: int = 0
    s: int = 0
    eta: float = 3.0
    strict: bool = True  # True (the schema's default): judge by the value at the rung; False: by the best one up to it

    def rung_epochs(self, epochs: int) -> list[int]:
        """The epochs after which a run of `epochs` epochs is judged. Never its last one: stopping there would save nothing."""
        bands = self._list_bands_from_above() if self.max_iter else []
        if not self.max_iter:
            band: float = self.min_iter
            for _ in range(MAX_BANDS):
                if band >= epochs:
                    break
                bands.append(int(band))
                band *= self.eta
        return sorted({band for band in bands if 1 <= band < epochs})

    def count_bands_from_above(self) -> int:
        """How many of the `s` bands come after a whole epoch. Two of them may come after the same one."""
        return len(self._list_bands_from_above())

    def _list_bands_from_above(self) -> list[int]:
        bands: list[int] = []
        band: float = self.max_iter
        for _ in range(min(self.s, MAX_BANDS_FROM_ABOVE)):
            band /= self.eta
            if band < 1:
                break
            bands.append(int(band))
        return bands

    def should_continue(self, value: float, best: float, peers: Sequence[float]) -> bool:
        """Whether a run goes on past a rung. All numbers are costs: less is better.

        value: its cost at the rung; best: its lowest cost of all epochs; peers: every run's cost at the rung, its own included.
        """
        threshold = sorted(peers)[int(1.0 / self.eta * len(peers))]
        return (value if self.strict else best) <= threshold


def parse_early_terminate(spec: Any) -> Hyperband:
    """Parse the `early_terminate` block of a sweep. Raises UserError that says what W&B accepts."""
    if not isinstance(spec, Mapping):
        raise UserError("early_terminate: write a mapping, for example {type: hyperband, min_iter: 3}")
    for option in spec:
        if option not in _OPTIONS:
            raise UserError(f"early_terminate: unknown key '{option}': {did_you_mean(str(option), _OPTIONS)}")
    if spec.get("type") != "hyperband":
        raise UserError("early_terminate: the only type there is is hyperband; write type: hyperband")
    if "min_iter" not in spec and not ("max_iter" in spec and "s" in spec):
        raise UserError("early_terminate: hyperband needs min_iter, or max_iter and s; add them")
    for option in ("min_iter", "max_iter", "s"):
        value = spec.get(option, 1)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not whole or isinstance(value, bool) or value < 1:
            raise UserError(f"early_terminate: {option} = {value!r}: expected a whole number of epochs, at least 1")
    eta, strict = spec.get("eta", 3), spec.get("strict", True)
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 1 < eta <= 1e300:
        raise UserError(f"early_terminate: eta = {shorten_repr(eta)}: expected a number above 1")
    if not isinstance(strict, bool):
        raise UserError(f"early_terminate: strict = {strict!r}: expected true or false")
    by_max = "max_iter" in spec and "s" in spec  # W&B looks at max_iter first
    found = Hyperband(
        0 if by_max else int(spec["min_iter"]), int(spec["max_iter"]) if by_max else 0, int(spec["s"]) if by_max else 0,
        float(eta), strict,
    )  # fmt: skip
    if by_max and found.max_iter / eta < 1:
        raise UserError(f"early_terminate: max_iter {found.max_iter} over eta {eta:g} is below one epoch; raise max_iter")
    return found
