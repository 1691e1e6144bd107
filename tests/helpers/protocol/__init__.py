"""A W&B server for tests: what the real client, its CLI and its wandb-core ask for, over HTTP on the loopback.

with Server() as server:
    ...                                  # WANDB_BASE_URL=server.url, WANDB_API_KEY=server.key
    server.runs["abc"].history           # what arrived
    server.fault = Fault("status", 500)  # what goes wrong from now on
server.assert_understood()               # nothing was asked that this server was not taught
"""

from helpers.protocol.server import Fault, Server
from helpers.protocol.world import Agent, Run, Sweep

__all__ = ["Agent", "Fault", "Run", "Server", "Sweep"]
