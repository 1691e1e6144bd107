"""Sends where a run ran to W&B's own fields: git, host, user, command, Python, processors, GPU, packages.

It comes from the record (environment.json, machine.json, requirements.txt), not from this process, which may run later and
elsewhere. wandb's public interface describes its own process only, so these calls of wandb 0.31 are private (contract-tested):
`_publish_run`, `publish_environment`, `publish_python_packages`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from cifar.errors import UserError
from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.settings import Mode
from cifar.system.files import UnreadableFileError, read_text
from cifar.system.redact import mask_secrets
from cifar.tracking.run_dir import RunDir, read_json
from cifar.tracking.system_metrics import MACHINE_FILE, PACKAGES_FILE

DIFF_FILE = "diff.patch"  # W&B's own name; written where `--save-diff` asks for it


class EnvironmentFeed(Feed):
    """environment.json, machine.json and requirements.txt -> W&B's fields, once they are there or the run trains no more.

    They are sent each time that the W&B run is opened: wandb-core keeps of an earlier opening's configuration no environment.
    """

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        super().open(run, arrived, mode)
        self._is_sent = False
        self._publish_run({})  # before any sample: W&B counts the samples' seconds from the start that is given here

    def send(self) -> None:
        # of a run that trains no more, what there is: an earlier version wrote no machine.json
        if not self._is_sent and ((self.run_dir.path / MACHINE_FILE).exists() or self.run_dir.state != "running"):
            self._send_all()

    def finish(self) -> None:
        self.send()

    def _send_all(self) -> None:
        environment, machine = read_environment(self.run_dir)
        if not environment:
            return
        self._is_sent = True
        self._publish_run(environment, machine)
        self.run._interface.publish_environment(build_environment(self.run_dir, environment, machine))
        if (diff := self.run_dir.path / DIFF_FILE).exists():
            self.run.save(str(diff), base_path=str(self.run_dir.path), policy="now")
        if packages := read_packages(self.run_dir):
            self.run._interface.publish_python_packages(packages)

    def _publish_run(self, environment: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> None:
        """Tell W&B the run's start, its host and its commit. wandb-core changes what is given here, and keeps the rest."""
        from wandb.proto import wandb_internal_pb2 as protocol

        record: Any = protocol.RunRecord(run_id=self.run_dir.id)  # type: ignore[attr-defined, unused-ignore]
        created = self.run_dir.read_json("run").get("created") or environment.get("started")
        if not created:
            return
        record.start_time.FromMicroseconds(round(float(created) * 1e6))
        record.host = str(environment.get("host") or "")
        record.git.commit = str((environment.get("git") or {}).get("commit") or "")
        record.git.remote_url = str((machine or {}).get("git_remote") or "")
        self.run._interface._publish_run(record)


def read_environment(run_dir: RunDir) -> tuple[dict[str, Any], dict[str, Any]]:
    """environment.json and machine.json without secrets; {} where there is none."""
    found = []
    for name in ("environment.json", MACHINE_FILE):
        try:
            found.append(dict(mask_secrets(read_json(run_dir.path / name), mask_keys=False)))
        except UserError:  # a damaged file tells nothing
            found.append({})
    return found[0], found[1]


def read_packages(run_dir: RunDir) -> list[Any]:
    """The lines of requirements.txt as wandb takes them: objects with `key` and `version`."""
    try:
        lines = read_text(run_dir.path / PACKAGES_FILE).splitlines()
    except UnreadableFileError:
        return []
    pairs = [line.partition("==") for line in lines]
    return [types.SimpleNamespace(key=name, version=version) for name, _, version in pairs if version]


def build_environment(run_dir: RunDir, environment: Mapping[str, Any], machine: Mapping[str, Any]) -> Any:
    """wandb's EnvironmentRecord of a run, whose JSON is W&B's `wandb-metadata.json`."""
    from wandb.proto import wandb_internal_pb2 as protocol

    record: Any = protocol.EnvironmentRecord()  # type: ignore[attr-defined, unused-ignore]
    record.os = str(environment.get("platform") or "")
    record.python = f"CPython {(environment.get('versions') or {}).get('python', '')}".rstrip()
    record.started_at.FromMicroseconds(round(float(environment.get("started") or 0.0) * 1e6))
    for field, key in (("host", "host"), ("username", "user"), ("root", "cwd"), ("executable", "executable")):
        setattr(record, field, str(environment.get(key) or ""))
    has_command = "program" in environment  # a trial of a worker has none: the command that repeats it stands there
    record.program = str(environment["program"]) if has_command else "-m cifar"
    record.args.extend(map(str, environment.get("args", []) if has_command else ["train", "--from", run_dir.id]))
    record.git.commit = str((environment.get("git") or {}).get("commit") or "")
    record.git.remote_url = str(machine.get("git_remote") or "")
    record.cpu_count = int(machine.get("cpu_count") or 0)
    record.cpu_count_logical = int(machine.get("cpu_count_logical") or environment.get("cores") or 0)
    if environment.get("device_type") != "cpu":
        record.gpu_type, record.gpu_count = str(environment.get("device") or ""), 1
    else:
        record.cpu.model = str(environment.get("device") or "")
    record.memory.total = int(machine.get("memory_total") or 0)
    for path, sizes in (machine.get("disk") or {}).items():
        record.disk[str(path)].total, record.disk[str(path)].used = int(sizes["total"]), int(sizes["used"])
    for gpu in machine.get("gpus") or []:
        record.gpu_nvidia.add(**{name: gpu[name] for name in ("name", "memory_total", "cuda_cores", "uuid") if name in gpu})
    record.cuda_version = str(machine.get("cuda_version") or "")
    for name, value in (machine.get("slurm") or {}).items():
        record.slurm[str(name)] = str(value)
    return record
