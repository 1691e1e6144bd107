"""What the mirror sends of a run's record besides its rows: the list of feeds, in the order in which they are called."""

from __future__ import annotations

from cifar.integrations.wandb.artifact_feed import ArtifactFeed
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.histograms import HistogramFeed

FEEDS: tuple[type[Feed], ...] = (HistogramFeed, ArtifactFeed)
