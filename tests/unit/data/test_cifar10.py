"""Finding, verifying and reading CIFAR-10, damaged and hostile files, and the validation cut."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar.data import cifar10
from cifar.data.download import compute_md5
from cifar.errors import UserError
from helpers.loopback import BATCH_NAMES, SMALL, archive_bytes, batch_bytes, md5

OFFICIAL = os.environ.get("CIFAR_DATA")
with_data = pytest.mark.skipif(not OFFICIAL, reason="CIFAR_DATA is not set: the official files are NOT tested")


@pytest.fixture(autouse=True)
def away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CIFAR_DATA", "CIFAR_MIRRORS", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_locate_prefers_the_option_then_the_variable_then_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cifar10.find_cifar10() is None
    cache = tmp_path / "cache" / "cifar"
    cache.mkdir(parents=True)
    (cache / cifar10.ARCHIVE).touch()
    assert cifar10.find_cifar10() == cache / cifar10.ARCHIVE
    variable = tmp_path / "variable" / cifar10.FOLDER
    variable.mkdir(parents=True)
    monkeypatch.setenv("CIFAR_DATA", str(variable.parent))
    assert cifar10.find_cifar10() == variable
    assert cifar10.find_cifar10(variable) == variable, "the folder itself will do"
    bare = tmp_path / "bare"
    bare.mkdir()
    assert cifar10.find_cifar10(bare) == cache / cifar10.ARCHIVE, "an option that holds nothing falls back on the cache"
    (bare / "test_batch").touch()
    assert cifar10.find_cifar10(bare) == bare
    assert cifar10.find_cifar10(cache / cifar10.ARCHIVE) == cache / cifar10.ARCHIVE


def test_a_missing_or_corrupt_batch_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    for name in cifar10.BATCHES:
        (folder / name).write_bytes(batch_bytes())
    with pytest.raises(UserError, match=r"data_batch_1 is not the official .* delete"):
        cifar10.load_dataset("cifar10", tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match=r"data_batch_4 cannot be read .* delete"):
        cifar10.load_dataset("cifar10", tmp_path)


def test_reading_ahead_changes_no_error_and_keeps_nothing_of_another_folder(tmp_path: Path) -> None:
    bad = tmp_path / cifar10.FOLDER
    bad.mkdir()
    for name in cifar10.BATCHES:
        (bad / name).write_bytes(batch_bytes())
    for place in (tmp_path, tmp_path / "empty", bad / "test_batch", tmp_path):
        cifar10.read_ahead(place)  # says nothing, whatever is there
    with pytest.raises(UserError, match=r"data_batch_1 is not the official .* delete"):
        cifar10.load_dataset("cifar10", tmp_path)
    assert not cifar10._reading_ahead
    cifar10.read_ahead(tmp_path)
    assert cifar10._take_read_ahead(tmp_path / "other") is None and not cifar10._reading_ahead


@with_data
def test_reading_ahead_gives_what_reading_gives() -> None:
    assert OFFICIAL
    plain = cifar10.load_dataset("cifar10", Path(OFFICIAL))
    cifar10.read_ahead(Path(OFFICIAL))
    (thread,) = cifar10._reading_ahead
    ahead = cifar10.load_dataset("cifar10", Path(OFFICIAL))
    assert ahead is thread.dataset and ahead.fingerprint == plain.fingerprint and ahead.official
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(ahead, name), getattr(plain, name))


def test_files_are_read_without_pytorch_and_every_name_is_there() -> None:
    program = (
        "import sys, cifar.data; assert 'torch' not in sys.modules;"
        "assert all(hasattr(cifar.data, name) for name in [*cifar.data.__all__, 'dataloader', 'load', 'split', 'obtain']);"
        "assert not hasattr(cifar.data, 'nothing') and 'Loader' in dir(cifar.data)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / cifar10.ARCHIVE).write_bytes(SMALL[:5000])
    with pytest.raises(UserError, match=rf"{cifar10.ARCHIVE} is not the official .*5,000 bytes of .*delete"):
        cifar10.load_dataset("cifar10", tmp_path)
    with pytest.raises(UserError, match=r"is damaged .*; delete"):
        cifar10._read_archive(tmp_path / cifar10.ARCHIVE)


def test_only_expected_members_leave_the_archive(tmp_path: Path) -> None:
    evil = dict.fromkeys(["../evil", str(tmp_path / "evil"), f"{cifar10.FOLDER}/../../evil", f"{cifar10.FOLDER}/evil"], b"x")
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    for content in (archive_bytes({**evil, **dict.fromkeys(BATCH_NAMES, b"")}), archive_bytes({BATCH_NAMES[0]: b""})):
        (folder / cifar10.ARCHIVE).write_bytes(content)  # it is there already, so nothing is downloaded
        if len(list(folder.iterdir())) == 1:
            cifar10.download_and_unpack(folder, [], md5=md5(content), size=len(content))
    assert not list(tmp_path.rglob("evil")) and sorted(p.name for p in (folder / cifar10.FOLDER).iterdir()) == sorted(
        cifar10.BATCHES
    )
    with pytest.raises(UserError, match="lacks data_batch_2"):
        cifar10._read_archive(folder / cifar10.ARCHIVE)


def test_reads_a_batch_as_numpy_would() -> None:
    images, labels = cifar10.read_batch(batch_bytes(4), "x")
    assert images.shape == (4, 3, 32, 32) and images.dtype == np.uint8 and labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(images.ravel(), np.arange(4 * 3072).astype(np.uint8))


class Hostile:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, np.load, np.fromfile, subprocess.Popen, getattr])
def test_a_pickle_that_tries_to_run_code_is_refused(function: object, tmp_path: Path) -> None:
    """Called below the MD5 check, as the file would be if its MD5 were right."""
    witness = tmp_path / "witness"
    call = Hostile(function, f"touch {witness}" if function is not eval else f"open({str(witness)!r}, 'w')")
    for content in (pickle.dumps({b"data": call}, 2), pickle.dumps([call], 4), batch_bytes(extra=call)):
        with pytest.raises(UserError, match=r"no part of an array.*delete"):
            cifar10.read_batch(content, "data_batch_1")
    assert not witness.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}",
        b"not a pickle",
        SMALL[:3000],
        batch_bytes()[:-500],
        pickle.dumps([1, 2], 2),
        batch_bytes(labels=[0, 1]),
        batch_bytes(labels=[0, 1, 10]),
        batch_bytes(data=np.zeros((3, 3072))),
        batch_bytes(data=np.zeros((3, 3071), np.uint8)),
        batch_bytes(data=np.array([[None]], object)),
        b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on the class itself
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(I1\ntRI5\nb.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x04Pother\n.",
    ],
)
def test_damaged_content_is_one_clear_error(content: bytes) -> None:
    with pytest.raises(UserError, match=r"data_batch_1 is not a CIFAR-10 batch file .*; delete it"):
        cifar10.read_batch(content, "data_batch_1")


@with_data
def test_the_official_files(tmp_path: Path) -> None:
    assert OFFICIAL
    data = cifar10.load_dataset("cifar10", Path(OFFICIAL))
    assert (data.name, data.official, data.classes) == ("cifar10", True, cifar10.CLASSES)
    assert data.train_images.shape == (50000, 3, 32, 32) and data.test_images.dtype == np.uint8
    assert np.bincount(data.train_labels).tolist() == [5000] * 10 and np.bincount(data.test_labels).tolist() == [1000] * 10
    folder = cifar10.find_cifar10(Path(OFFICIAL))
    assert folder
    if folder.is_dir():
        oracle = pickle.loads((folder / "data_batch_3").read_bytes(), encoding="latin1")  # its MD5 was checked
        assert np.array_equal(data.train_images[20000:30000].reshape(10000, -1), oracle["data"])
        assert data.train_labels[20000:30000].tolist() == oracle["labels"]
        assert compute_md5(folder / "test_batch") == cifar10.BATCHES["test_batch"]


# -- the cut -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 17, 5000, 45000])
def test_split_is_stratified_and_whole(size: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 5000))
    train, val = cifar10.split_indices(labels, size)
    assert len(val) == size and np.array_equal(np.sort(np.concatenate([train, val])), np.arange(50000))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(val) > 0) and train.dtype == val.dtype == np.int64
    assert np.ptp(np.bincount(labels[val], minlength=10)) <= 1


def test_split_never_changes() -> None:
    labels = np.arange(50000) % 10
    _, val = cifar10.split_indices(labels, 5000)
    assert np.array_equal(val, cifar10.split_indices(labels, 5000)[1]) and not np.array_equal(
        val, cifar10.split_indices(labels, 5000, seed=1)[1]
    )
    assert md5(val.astype("<i8").tobytes()) == "3ddb25a639c2b7b81f3ff64e8df5673b"


def test_importing_is_light() -> None:
    code = "import sys, cifar.data; print([m for m in ('torchvision', 'requests', 'matplotlib', 'wandb') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
