"""Weights in fewer bits: the values by hand, the bound of the error, and what is not rounded."""

from __future__ import annotations

import pytest
import torch

from cifar import registry
from cifar.training.rounding import count_bytes, restore_weights, round_weights


def test_eight_bits_by_hand() -> None:
    """The largest of a row is level 127. 0.5 of 2.54 is 25 levels of 0.02; -0.011 is -0.55 of a level, which is -1."""
    weight = torch.tensor([[2.54, 0.5, -0.011], [0.0, 0.0, 0.0], [-127.0, 63.4, 1.0]])
    rounded = round_weights({"w": weight}, eight_bit=True)
    assert rounded["w"].dtype == torch.int8 and rounded["w::scale"].dtype == torch.float32
    assert rounded["w"].tolist() == [[127, 25, -1], [0, 0, 0], [-127, 63, 1]]
    torch.testing.assert_close(rounded["w::scale"], torch.tensor([0.02, 0.0, 1.0]))
    torch.testing.assert_close(
        restore_weights(rounded)["w"], torch.tensor([[2.54, 0.5, -0.02], [0.0] * 3, [-127.0, 63.0, 1.0]])
    )


def test_no_weight_moves_by_more_than_half_a_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3) * torch.logspace(-6, 3, 16).view(16, 1, 1, 1)
    rounded = round_weights({"w": weight}, eight_bit=True)
    error = (restore_weights(rounded)["w"] - weight).abs().flatten(1).amax(1)
    largest = weight.abs().flatten(1).amax(1)
    assert bool((error <= largest / 254 * (1 + 1e-5)).all())
    assert bool((error > 0).all()), "it is rounded"
    again = round_weights(restore_weights(rounded), eight_bit=True)
    assert torch.equal(again["w"], rounded["w"]), "rounding what is rounded changes no level"


@pytest.mark.parametrize("eight_bit", [False, True])
def test_small_and_whole_tensors_stay(eight_bit: bool) -> None:
    """A variance of 1e-9 or 1e6 does not exist in half precision."""
    state = {
        "conv.weight": torch.ones(2, 3, 1, 1) / 3,
        "norm.running_var": torch.tensor([1e-9, 1e6]),
        "norm.num_batches_tracked": torch.tensor(7),
        "table": torch.tensor([[1, 2], [3, 4]]),
    }
    rounded = round_weights(state, eight_bit=eight_bit)
    for name in ("norm.running_var", "norm.num_batches_tracked", "table"):
        assert rounded[name].dtype == state[name].dtype and torch.equal(rounded[name], state[name])
    assert rounded["conv.weight"].element_size() == (1 if eight_bit else 2)
    assert restore_weights(rounded).keys() == state.keys()
    assert count_bytes(rounded) == 8 + 8 + 32 + (6 + 8 if eight_bit else 12)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (1e5, "too large")])
def test_what_half_precision_cannot_hold_is_refused(value: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        round_weights({"w": torch.full((2, 2), value)})


def test_a_state_dict_of_an_ordinary_run_comes_back_as_it_is() -> None:
    """Also one that has names or bytes of this kind itself."""
    state = {
        "a::scale": torch.ones(2),
        "b": torch.ones(2, 2, dtype=torch.int8),
        "c": torch.ones(2, 2),
        "c::scale": torch.ones(2),
    }
    restored = restore_weights(state)
    assert restored.keys() == state.keys() and all(restored[name] is state[name] for name in state)


def test_a_scale_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="scale of shape"):
        restore_weights({"w": torch.ones(2, 3, dtype=torch.int8), "w::scale": torch.ones(3)})


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_network_computes_nearly_the_same(eight_bit: bool) -> None:
    torch.manual_seed(0)
    network = registry.models["resnet8"].build(width=4).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        network.load_state_dict(restore_weights(round_weights(network.state_dict(), eight_bit=eight_bit)))
        after = network(images)
    difference = float((before - after).abs().max() / before.abs().max())
    assert 0 < difference < (0.1 if eight_bit else 0.01)
