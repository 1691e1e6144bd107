"""The notes of a run on W&B say what its sweep asks: those of a local sweep here, hosted ones in `assert_as_trained`."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.hosted_sweeps import GRID, start_command
from helpers.processes import wait_for_exit
from helpers.protocol import Server
from helpers.system_fields import assert_shown_as_recorded

QUESTION = "Which network?\nTwo lines, <b> & é."
DESCRIPTION = 'description: "\\n Which network?\\nTwo lines, <b> & é. "\n'


@pytest.mark.slow
def test_of_a_local_sweep_that_is_mirrored_and_then_pushed(wandb_server: Server, runs: Path, tmp_path: Path) -> None:
    small = GRID.replace("[conv4, conv8]", "[conv4]") + "  epochs: {value: 1}\n"
    lines = [line for line in small.splitlines(keepends=True) if not line.startswith("description")]
    (tmp_path / "tiny.yaml").write_text("".join([lines[0], DESCRIPTION, *lines[1:]]))
    words = ("sweep", str(tmp_path / "tiny.yaml"), "--no-agent", "--wandb", "disabled")
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", *words))
    (folder,) = (runs / "sweeps").iterdir()
    assert code == 0, output
    words = ("agent", folder.name, "--workers", "1", "--wandb", "online")
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", *words))
    assert code == 0 and len(wandb_server.runs) == 2 and not wandb_server.sweeps, output
    assert [run.notes for run in wandb_server.runs.values()] == [QUESTION] * 2
    for run in wandb_server.runs.values():
        assert run.group == folder.name
        assert_shown_as_recorded(run, runs / run.id)
    wandb_server.runs.clear()
    code, output = wait_for_exit(start_command(wandb_server, "-m", "cifar", "push", folder.name))
    assert code == 0 and [run.notes for run in wandb_server.runs.values()] == [QUESTION] * 2, output
    assert sorted(wandb_server.only_sweep().runs) == sorted(wandb_server.runs)
    for run in wandb_server.runs.values():  # on a server that had none of it
        assert_shown_as_recorded(run, runs / run.id)
