"""The official files: found or downloaded, verified, read without running what is in them, and split."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar.data import synthetic
from cifar.data.download import Progress, compute_md5, download_file, measure_rate
from cifar.errors import UserError
from cifar.system.devices import num_cores
from cifar.system.disk import cache_folder
from cifar.system.files import MIB, UnreadableFileError, read_bytes
from cifar.system.variables import read_path, read_variable, read_words
from cifar.tracking.predictions import CLASSES

# Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"; address, names and sums as torchvision has them.
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE, ARCHIVE_MD5, ARCHIVE_SIZE = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071
FOLDER = "cifar-10-batches-py"
BATCHES = {  # in the order of the training set, the test set last
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
MAX_BATCH_BYTES, MAX_UNPACKED_BYTES = 64 * MIB, 512 * MIB  # a batch has 30 MiB, the archive's content 178 MiB
MAX_DOWNLOAD_SECONDS = 600.0  # `auto` takes the generated data if a download would take longer
NEEDED_BYTES = 400 << 20  # for the archive and its content
STAND_IN_OPTION = "--dataset stand-in"
Apply = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]  # `map`, or a thread pool's


@dataclass(frozen=True)
class Dataset10:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64: 50,000 to train on and 10,000 to test with."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    name: str
    fingerprint: str
    official: bool
    classes: tuple[str, ...]


def find_cifar10(data_dir: Path | None = None) -> Path | None:
    """The folder of batch files, or the archive: in `data_dir`, else CIFAR_DATA, else the cache. None if it is nowhere."""
    for place in _search_folders(data_dir):
        try:
            if place.exists() and not place.is_dir() and not place.is_file():
                raise UserError(f"{place} is neither a folder nor a file; name another one with --data-dir")
            for candidate in (place / FOLDER, place, place / ARCHIVE):
                if candidate.is_dir() and (candidate.name == FOLDER or any((candidate / name).exists() for name in BATCHES)):
                    return candidate
                if candidate.is_file():
                    return candidate
        except OSError as error:
            raise UserError(f"{place} cannot be looked into ({error.strerror}); name another folder with --data-dir") from None
    return None


def _search_folders(data_dir: Path | None) -> list[Path]:
    """Folders to search. A download goes to the first."""
    given_dir = data_dir or (read_path("CIFAR_DATA", "") if read_variable("CIFAR_DATA") else None)
    return ([Path(os.path.expanduser(given_dir)).absolute()] if given_dir else []) + [cache_folder()]


def list_urls(mirrors: Sequence[str] = ()) -> list[str]:
    """The official address, then `mirrors`, then those of CIFAR_MIRRORS (separated by spaces)."""
    return list(dict.fromkeys([URL, *mirrors, *read_words("CIFAR_MIRRORS")]))


def find_or_download(data_dir: Path | None = None, *, mirrors: Sequence[str] = (), progress: Progress | None = None) -> Path:
    """`find_cifar10`, else download into the first folder of the search. Raises UserError where neither can be done."""
    found = find_cifar10(data_dir)
    if found:
        return found
    folder = _search_folders(data_dir)[0]
    try:
        return download_and_unpack(folder, list_urls(mirrors), progress=progress)
    except UserError as error:
        raise UserError(
            f"{error}; no CIFAR-10 in {' or '.join(map(str, _search_folders(data_dir)))} either: put {ARCHIVE} into {folder}, "
            f"or set CIFAR_DATA to the folder that holds it, or take the generated data by {STAND_IN_OPTION}"
        ) from error


def download_and_unpack(
    folder: Path, urls: Sequence[str], *, md5: str = ARCHIVE_MD5, size: int = ARCHIVE_SIZE, progress: Progress | None = None
) -> Path:
    """Download the archive into `folder`, unpack the batches beside it, and return their folder."""
    from filelock import FileLock

    archive, batches = folder / ARCHIVE, folder / FOLDER
    download_file(urls, archive, md5=md5, size=size, progress=progress)
    try:
        with FileLock(folder / f".{FOLDER}.lock"):
            if not batches.exists():
                content = _read_archive(archive)
                with tempfile.TemporaryDirectory(dir=folder, prefix=f".{FOLDER}.") as temporary:
                    new_folder = Path(temporary) / FOLDER
                    new_folder.mkdir()
                    for name, batch in content.items():
                        (new_folder / name).write_bytes(batch)
                    new_folder.rename(batches)
    except OSError as error:
        raise UserError(f"{batches} cannot be written ({error.strerror}); free some space or name another folder") from error
    return batches


def resolve_auto(data_dir: Path | None = None, timeout: float = 10.0, mirrors: Sequence[str] = ()) -> tuple[str, str]:
    """("cifar10" or "stand-in", the reason in one sentence). Takes at most `timeout` seconds, whatever the network does."""
    deadline = time.monotonic() + timeout - 0.5
    found = find_cifar10(data_dir)
    if found:
        return "cifar10", f"CIFAR-10 was found in {found}"
    folders = _search_folders(data_dir)
    not_found = f"no CIFAR-10 in {' or '.join(map(str, folders))}"
    no_space = _explain_no_space(folders[0])
    if no_space:
        return "stand-in", f"{not_found}, and it cannot be downloaded: {no_space}"
    min_rate = ARCHIVE_SIZE / MAX_DOWNLOAD_SECONDS
    rate = measure_rate(list_urls(mirrors), ARCHIVE_SIZE, deadline - time.monotonic(), enough=4 * min_rate)
    if rate >= min_rate:
        return "cifar10", f"{not_found}; it will be downloaded, in about {max(ARCHIVE_SIZE / rate / 60, 0.1):.1f} minutes"
    slow = f"a download would take {ARCHIVE_SIZE / rate / 60:.0f} minutes" if rate else f"no answer from {URL.split('/')[2]}"
    return "stand-in", f"{not_found}, and {slow}"


def _explain_no_space(folder: Path) -> str:
    """Why the archive cannot be stored in `folder`; empty if it can."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written"
    free = shutil.disk_usage(existing).free
    return "" if free >= NEEDED_BYTES else f"{existing} has {free >> 20} MiB free of the {NEEDED_BYTES >> 20} it takes"


def load_dataset(
    dataset: str, data_dir: Path | None = None, *, mirrors: Sequence[str] = (), progress: Progress | None = None
) -> Dataset10:
    """`cifar10` (found or downloaded; the MD5 of each file is checked) or `stand-in`. A UserError names a bad file."""
    if dataset == "stand-in":
        _reading_ahead.clear()
        arrays, fingerprint = synthetic.load_with_fingerprint(cache_folder())
        return Dataset10(*arrays, name=dataset, fingerprint=fingerprint, official=False, classes=synthetic.CLASSES)
    assert dataset == "cifar10", f"'{dataset}' has to be resolved first"
    path = find_or_download(data_dir, mirrors=mirrors, progress=progress)
    if found := _take_read_ahead(path):
        return found
    with ThreadPoolExecutor(min(len(BATCHES), num_cores()), "batch-file") as threads:
        return _load_official(path, threads.map)


def _load_official(path: Path, apply: Apply = map) -> Dataset10:
    """The official files, read and checked. `apply`: as `map`, for what can be done for each file by itself."""
    content = _read_verified(path, apply)
    parts = list(apply(lambda name: read_batch(content[name], str(path / name), is_official=True), BATCHES))
    images, labels = [images for images, _ in parts], [labels for _, labels in parts]
    digest = hashlib.sha256(" ".join(BATCHES.values()).encode()).hexdigest()  # of the MD5 sums that were just checked
    return Dataset10(
        np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1], "cifar10", digest, True, CLASSES
    )


class _ReadAhead(threading.Thread):
    """Reads the official files while the main thread does something else. The process does not wait for it at its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="read-ahead", daemon=True)
        self.path, self.dataset = path, None

    dataset: Dataset10 | None  # None: not read, and `load_dataset` finds out why

    def run(self) -> None:
        with contextlib.suppress(Exception):
            self.dataset = _load_official(self.path)


_reading_ahead: list[_ReadAhead] = []  # one at most


def read_ahead(data_dir: Path | None = None) -> None:
    """Begin to read the official files in a thread, where they are at hand: `load_dataset` then takes what it has read.

    For the seconds in which PyTorch is imported. Raises nothing: what is wrong with the files `load_dataset` says.
    """
    with contextlib.suppress(UserError, RuntimeError):  # RuntimeError: no more threads can be started
        if (path := find_cifar10(data_dir)) and not _reading_ahead:
            thread = _ReadAhead(path)
            thread.start()
            _reading_ahead.append(thread)


def _take_read_ahead(path: Path) -> Dataset10 | None:
    """What `read_ahead` has read from there; None if that was not asked for, or failed."""
    found = None
    while _reading_ahead:  # also of another folder: its arrays are not kept
        thread = _reading_ahead.pop()
        if thread.path == path:
            thread.join()
            found = thread.dataset
    return found


def split_indices(labels: NDArray[np.int64], val_size: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, val): sorted indices into the training set. val has `val_size`, evenly distributed over the classes."""
    assert 0 <= val_size < len(labels), val_size
    bit_source = np.random.Generator(np.random.PCG64(seed))
    classes = np.flatnonzero(np.bincount(labels))  # np.unique imports numpy.ma
    val_parts = []
    for class_index, label in enumerate(classes):
        num_val = val_size // len(classes) + (class_index < val_size % len(classes))
        members = np.flatnonzero(labels == label)
        # ordered by raw bits, because NumPy never changes those; the split must never change either
        val_parts.append(members[np.argsort(bit_source.bit_generator.random_raw(len(members)), kind="stable")[:num_val]])
    val = np.sort(np.concatenate(val_parts)).astype(np.int64)
    is_train = np.ones(len(labels), dtype=bool)
    is_train[val] = False
    return np.flatnonzero(is_train).astype(np.int64), val


# -- reading files that may be damaged or hostile ----------------------------------------------------------------------------


def _read_verified(path: Path, apply: Apply = map) -> dict[str, bytes]:
    """Name -> content of the six batch files in a folder or archive, after checking the official MD5 of each."""
    if path.is_file():
        if path.stat().st_size != ARCHIVE_SIZE or compute_md5(path) != ARCHIVE_MD5:
            raise UserError(
                f"{path} is not the official CIFAR-10 archive ({path.stat().st_size:,} bytes of {ARCHIVE_SIZE:,}, "
                "or other ones: a broken download?); delete it and run again to download it, or name the right file"
            )
        content: Mapping[str, bytes] = _read_archive(path)
    else:
        remedy = f"delete the folder {path} and run again to download it"
        content = dict(zip(BATCHES, apply(lambda name: _read_file(path / name, remedy), BATCHES), strict=True))
    sums = apply(lambda name: hashlib.md5(content[name], usedforsecurity=False).hexdigest(), BATCHES)
    for name, md5 in zip(BATCHES, sums, strict=True):
        if md5 != BATCHES[name]:
            raise UserError(
                f"{path / name} is not the official CIFAR-10 file (its MD5 differs); copy it anew, "
                f"or delete {path} and run again to download it"
            )
    return dict(content)


def _read_file(path: Path, remedy: str) -> bytes:
    try:
        return read_bytes(path, MAX_BATCH_BYTES)
    except UnreadableFileError as error:
        raise UserError(f"{path} cannot be read ({error.reason}); {remedy}") from None


def _read_archive(archive: Path) -> dict[str, bytes]:
    """Read the six expected files into memory, by name. No path that the archive names is ever written to."""
    expected = {f"{FOLDER}/{name}": name for name in BATCHES}
    content = {}
    try:
        # a stream: read once, from front to back
        with gzip.open(archive) as unpacked, tarfile.open(fileobj=_LimitedReader(unpacked), mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.name in expected and member.isreg() and member.size <= MAX_BATCH_BYTES:
                    file = tar.extractfile(member)
                    assert file
                    content[expected[member.name]] = file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run again to download it") from None
    missing = [name for name in BATCHES if name not in content]
    if missing:
        raise UserError(f"{archive} lacks {', '.join(missing)}; delete it and run again to download it")
    return {name: content[name] for name in BATCHES}


class _LimitedReader:
    """What an archive unpacks to, up to MAX_UNPACKED_BYTES: a small archive can unpack to anything."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file, self._left = file, MAX_UNPACKED_BYTES

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB")
        return content


class _PickledArray:
    """Stands for an array while a batch file is read (`numpy.core.multiarray._reconstruct`): it only holds bytes."""

    def __init__(self, *_: object) -> None:
        self.value: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _PickledDtype) or kind.name not in (b"u1", "u1") or fortran:
            raise pickle.UnpicklingError("an array that is not uint8")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


class _PickledDtype:
    """Stands for `numpy.dtype`: it only holds a name."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Ignored: byte order and the like do not matter for single bytes."""


class _Unpickler(pickle._Unpickler):
    """Knows only the names of a pickled array, and replaces them by the two harmless classes above.

    pickle's reader in Python: the one in C makes room for as many memos as a file asks for, tens of gigabytes.
    """

    known: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise UserError(f"it asks for {module}.{name}, which is no part of an array")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it refers to something outside of the file")


class _FastUnpickler(pickle.Unpickler):
    """The same in C, for the official files."""

    find_class, persistent_load, known = _Unpickler.find_class, _Unpickler.persistent_load, _Unpickler.known


def read_batch(content: bytes, name: str, *, is_official: bool = False) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A pickled batch -> images (N, 3, 32, 32) and labels (N,). Runs no code from the file; `name` is for error messages.

    is_official: its MD5 is the published one.
    """
    try:
        unpickler = _FastUnpickler if is_official else _Unpickler
        batch = unpickler(io.BytesIO(content), encoding="bytes").load()
        images, listed = batch[b"data"].value, batch[b"labels"]
        if not isinstance(listed, list) or not set(map(type, listed)) <= {int}:
            raise ValueError("labels that are no whole numbers")
        labels = np.array(listed, dtype=np.int64)
        if images.shape != (len(labels), 3072) or not ((labels >= 0) & (labels < len(CLASSES))).all():
            raise ValueError("wrong shapes or labels")
    except Exception as error:  # a hostile file can raise anything
        raise UserError(f"{name} is not a CIFAR-10 batch file ({error}); delete it and download CIFAR-10 again") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32)), labels
