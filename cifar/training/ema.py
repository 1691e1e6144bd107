"""An exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


class ExponentialMovingAverage:
    """The moving average of a model's weights and buffers, kept in a second model. That one is evaluated instead.

    The decay warms up as (1 + t) / (10 + t), where t is the number of updates, so that the first, random weights are soon
    forgotten. Integer buffers (counters) are copied.
    """

    def __init__(self, model: nn.Module, averaged_model: nn.Module, decay: float) -> None:
        self.model, self.averaged_model, self.decay = model, averaged_model, decay
        pairs = list(zip(averaged_model.state_dict().values(), model.state_dict().values(), strict=True))
        self.float_pairs = [pair for pair in pairs if pair[0].is_floating_point() or pair[0].is_complex()]
        self.counter_pairs = [pair for pair in pairs if not (pair[0].is_floating_point() or pair[0].is_complex())]
        self.num_updates = torch.zeros((), device=pairs[0][0].device)  # float32 counts exactly up to 16 million

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights, in place."""
        step_size = 1 - ((1 + self.num_updates) / (10 + self.num_updates)).clamp(max=self.decay)
        averages, weights = [pair[0] for pair in self.float_pairs], [pair[1] for pair in self.float_pairs]
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, step_size)
        torch._foreach_add_(averages, change)
        for averaged_counter, counter in self.counter_pairs:
            averaged_counter.copy_(counter)
        self.num_updates += 1
