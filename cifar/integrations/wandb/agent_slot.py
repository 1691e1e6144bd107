"""One slot of an agent on W&B: a registered W&B agent, and the thread that exchanges messages for it."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import TYPE_CHECKING

from cifar.integrations.wandb import final_states
from cifar.integrations.wandb.api import REGISTER_AGENT, SEND_HEARTBEAT
from cifar.sweeps.backend import Trial

if TYPE_CHECKING:
    from cifar.integrations.wandb.backend import WandbBackend

HEARTBEAT_SECONDS = 5.0  # as often as wandb's own agent


class AgentSlot(threading.Thread):
    """One registered W&B agent, with at most one run at a time. The thread sends its heartbeats and receives commands.

    `WandbBackend` reads and changes the attributes; they are protected by its lock.
    """

    def __init__(self, backend: WandbBackend, number: int) -> None:
        super().__init__(daemon=True, name=f"slot-{number}")
        self.backend, self.number = backend, number
        self.agent_id = ""  # W&B's; "" until the agent is registered
        self.wants_trial = False  # a worker is free, so W&B may give a trial
        self.offered_trial: Trial | None = None  # given by W&B, not claimed yet
        self.run_id = ""  # of the claimed trial; "" if there is none
        self.is_run_announced = False  # W&B knows that the run runs
        self.retry_trial: Trial | None = None  # to be run again with the same run id, because its process was killed
        self.stop_requested = False  # W&B asked to stop the run
        self.has_exited = False  # W&B has no more trials for this agent
        self.wake_event = threading.Event()

    @property
    def is_free(self) -> bool:
        return not (self.run_id or self.offered_trial)

    def run(self) -> None:
        while not self.backend.is_closed:
            with self.backend.lock:
                is_active = not self.has_exited and bool(self.run_id or (self.wants_trial and not self.offered_trial))
            if is_active:
                try:
                    self._send_heartbeat()
                    self.backend.mark_server_reachable()
                except Exception as error:
                    self.backend.mark_server_silent(error)
            self.wake_event.wait(HEARTBEAT_SECONDS)
            self.wake_event.clear()

    def _send_heartbeat(self) -> None:
        """Register the agent and announce its run if that is still to be done, send a heartbeat, and apply W&B's commands."""
        target = self.backend.wandb_target
        if not self.agent_id:
            host = f"{socket.gethostname()}-{os.getpid()}-{self.number}"
            registered = self.backend.client.execute_graphql(
                REGISTER_AGENT, host=host, sweep=self.backend.id, projectName=target["project"], entityName=target["entity"]
            )
            self.agent_id = registered["createAgent"]["agent"]["id"]
        with self.backend.lock:
            run_id, is_run_announced = self.run_id, self.is_run_announced
        if run_id and not is_run_announced:  # W&B would give an unannounced run to another agent
            names = {"name": run_id, "project": target["project"], "entity": target["entity"]}
            self.backend.client.execute_graphql(final_states.UPSERT_RUN, **names, sweep=self.backend.id, state="running")
            self.is_run_announced = True
        states = json.dumps({run_id: True} if run_id else {})
        answer = self.backend.client.execute_graphql(SEND_HEARTBEAT, id=self.agent_id, metrics="{}", runState=states)
        commands = json.loads(answer["agentHeartbeat"]["commands"] or "[]")
        for command in commands:
            self.backend.apply_command(self, command)
        if not commands and not run_id:
            self.backend.refresh_state()
