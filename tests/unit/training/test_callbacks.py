"""What a terminal shows of a run while it trains."""

from __future__ import annotations

import re

import pytest

from cifar.training.callbacks import ProgressBarCallback, format_epoch_line

ROW = {
    "epoch": 1, "train/loss": 2.1, "train/acc": 0.2, "val/loss": 1.9, "val/acc": 0.3125, "train/lr": 0.05,
    "system/seconds": 75.0, "system/images_per_second": 12345.0,
}  # fmt: skip


def test_the_bar_shows_loss_and_accuracy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "80")
    bar = ProgressBarCallback()
    bar.on_run_start({"name": "a name that is much longer than the bar has room for"}, epochs=100, steps=352)
    for epoch in (1, 2):
        bar.on_step_end(epoch, 352)
        bar.on_epoch_end({**ROW, "epoch": epoch})
    bar.on_run_end("finished", "", {})
    text = re.sub(r"\x1b\[[\d?;]*[A-Za-z]", "", capsys.readouterr().out)
    lines = re.split(r"[\r\n]+", text)
    bars = [line for line in lines if "steps" in line]
    assert bars[-1].startswith("epoch 2/100  loss 2.100  val 31.25 % ") and "704/35200 steps" in bars[-1]
    assert max(map(len, lines)) <= 80, lines


def test_an_epochs_line_fits_the_terminal() -> None:
    whole = "epoch   1/9  train 20.00 % (loss 2.100)  val 31.25 % (loss 1.900)  lr 0.05  75 s  12,345 images/s"
    assert format_epoch_line(ROW, 9) == format_epoch_line(ROW, 9, 100) == whole
    assert format_epoch_line(ROW, 9, 80) == whole[: whole.index("  12,345")]
    assert format_epoch_line(ROW, 9, 20).endswith("(loss 1.900)"), "accuracies are always there"
