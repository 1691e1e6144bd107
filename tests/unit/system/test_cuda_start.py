"""Starting CUDA ahead of PyTorch: for which devices, and that nothing is said where there is no driver."""

from __future__ import annotations

import threading

import pytest

from cifar.system import cuda_start


@pytest.mark.parametrize(
    ("device", "gpu"),
    [("auto", 0), ("cuda", 0), ("cuda:3", 3), ("cpu", None), ("mps", None), ("cuda:", None), ("cuda:-1", None), ("", None)],
)
def test_the_gpu_that_will_be_used_is_started(device: str, gpu: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cuda_start.choose_gpu(device) == gpu
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cuda_start.choose_gpu(device) is None, "of one training each process chooses its own later"


def test_nothing_is_said_where_there_is_no_such_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    cuda_start.start_cuda_ahead("cuda:10000")
    for thread in threading.enumerate():
        if thread.name == "cuda-start":
            thread.join()
    assert capfd.readouterr() == ("", "")
