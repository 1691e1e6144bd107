"""What the mirror sends of a run's record besides its rows: the list of feeds, in the order in which they are called."""

from __future__ import annotations

from cifar.integrations.wandb.artifact_feed import ArtifactFeed
from cifar.integrations.wandb.console import ConsoleFeed
from cifar.integrations.wandb.environment import EnvironmentFeed
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.histograms import HistogramFeed
from cifar.integrations.wandb.system_metrics import SystemMetricsFeed

# The environment comes first: it gives the start from which W&B counts the seconds of the samples.
FEEDS: tuple[type[Feed], ...] = (EnvironmentFeed, ConsoleFeed, SystemMetricsFeed, HistogramFeed, ArtifactFeed)
