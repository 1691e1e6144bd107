"""docs/slurm.sh against a pretended sbatch, srun and scontrol: a warned array task gives its trial back and is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.agent_processes import create_sweep, list_epochs_of_cell
from helpers.paths import ROOT
from helpers.processes import wait_until

FAKES = {
    "srun": '#!/bin/bash\nexec "$@"\n',
    "scontrol": '#!/bin/bash\necho "$@" >> "$FAKE_LOG"\n',
    # as sbatch: copies the script, sets the task's variables, and runs it in the folder it was submitted from
    "sbatch": """#!/bin/bash
cp "$1" "$FAKE_SPOOL"; shift
export SLURM_JOB_ID=71 SLURM_ARRAY_JOB_ID=70 SLURM_ARRAY_TASK_ID=1 SLURM_SUBMIT_DIR=$PWD
exec bash "$FAKE_SPOOL" "$@"
""",
}


@pytest.mark.slow
def test_a_warned_task_gives_its_trial_back_and_is_queued_again(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {**FAKES, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    backend = create_sweep(runs, "parameters: {model: {value: conv4}}", epochs=40, train_size=1024)
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "log"), "CIFAR_LEASE": "4",
        "FAKE_SPOOL": str(tmp_path / "slurm_script"), "CIFAR_AGENT_OPTIONS": "--workers 1 --wandb disabled",
    }  # fmt: skip

    def submitted() -> subprocess.Popen[str]:
        return subprocess.Popen(["sbatch", "docs/slurm.sh", backend.id], cwd=ROOT, env=environment, text=True)

    task = submitted()
    wait_until(lambda: len(list_epochs_of_cell(backend, 0)) > 3)
    task.send_signal(signal.SIGUSR1)
    assert task.wait(60) == 138 and backend.count_states() == {"preempted": 1}
    assert (tmp_path / "log").read_text() == "requeue 70_1\n"
    assert submitted().wait(200) == 0
    assert list_epochs_of_cell(backend, 0) == list(range(1, 41)) and backend.count_states() == {"finished": 1}
    assert (tmp_path / "log").read_text() == "requeue 70_1\n"


def test_the_kubernetes_job_runs_an_agent_whose_password_is_a_secret() -> None:
    job = yaml.safe_load((ROOT / "docs" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] + container["args"] == ["python", "-m", "cifar", "agent", "SWEEP_ID"]
    assert "secretKeyRef" in container["env"][0]["valueFrom"] and container["env"][0]["name"] == "CIFAR_STORAGE"
