"""The official files: found or downloaded, verified, read without trusting them, split once."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar.data import synthetic as stand_in
from cifar.data.download import Progress, download, md5_of, probe
from cifar.errors import UserError

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
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATIENCE = 600.0  # seconds: `auto` takes the stand-in where a download would take longer
ROOM = 400 << 20  # bytes: the archive and what is in it
STAND_IN = "--dataset stand-in"


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


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/cifar, else ~/.cache/cifar."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cifar"


def locate(data_dir: Path | None = None) -> Path | None:
    """The folder of batches, or the archive: in `data_dir`, else CIFAR_DATA, else the cache. None: nowhere."""
    for place in _places(data_dir):
        try:
            for candidate in (place / FOLDER, place, place / ARCHIVE):
                if candidate.is_dir() and (candidate.name == FOLDER or any((candidate / name).exists() for name in BATCHES)):
                    return candidate
                if candidate.is_file():
                    return candidate
        except OSError as error:
            raise UserError(f"{place} cannot be looked into ({error.strerror}); name another folder with --data-dir") from None
    return None


def _places(data_dir: Path | None) -> list[Path]:
    """Where to look; a download goes to the first."""
    named = data_dir or os.environ.get("CIFAR_DATA")
    return ([Path(named).expanduser().absolute()] if named else []) + [cache_folder()]


def addresses(mirrors: Sequence[str] = ()) -> list[str]:
    """The official address, then `mirrors`, then those of CIFAR_MIRRORS (separated by spaces)."""
    return list(dict.fromkeys([URL, *mirrors, *os.environ.get("CIFAR_MIRRORS", "").split()]))


def obtain(data_dir: Path | None = None, *, mirrors: Sequence[str] = (), progress: Progress | None = None) -> Path:
    """`locate`, else download into the first place looked at. Raises UserError where neither can be done."""
    found = locate(data_dir)
    if found:
        return found
    folder = _places(data_dir)[0]
    try:
        return fetch(folder, addresses(mirrors), progress=progress)
    except UserError as error:
        raise UserError(
            f"{error}; no CIFAR-10 in {' or '.join(map(str, _places(data_dir)))} either: put {ARCHIVE} into {folder}, "
            f"or set CIFAR_DATA to the folder that holds it, or take the generated data by {STAND_IN}"
        ) from error


def fetch(
    folder: Path, urls: Sequence[str], *, md5: str = ARCHIVE_MD5, size: int = ARCHIVE_SIZE, progress: Progress | None = None
) -> Path:
    """Download the archive into `folder`, unpack the batches beside it, and return their folder."""
    from filelock import FileLock

    archive, batches = folder / ARCHIVE, folder / FOLDER
    download(urls, archive, md5=md5, size=size, progress=progress)
    try:
        with FileLock(folder / f".{FOLDER}.lock"):
            if not batches.exists():
                content = _members(archive)
                with tempfile.TemporaryDirectory(dir=folder, prefix=f".{FOLDER}.") as temporary:
                    made = Path(temporary) / FOLDER
                    made.mkdir()
                    for name, batch in content.items():
                        (made / name).write_bytes(batch)
                    made.rename(batches)
    except OSError as error:
        raise UserError(f"{batches} cannot be written ({error.strerror}); free some space or name another folder") from error
    return batches


def resolve_auto(data_dir: Path | None = None, timeout: float = 10.0, mirrors: Sequence[str] = ()) -> tuple[str, str]:
    """("cifar10" or "stand-in", why, in one sentence) within `timeout` seconds, whatever the network does."""
    deadline = time.monotonic() + timeout - 0.5
    found = locate(data_dir)
    if found:
        return "cifar10", f"CIFAR-10 was found in {found}"
    places = _places(data_dir)
    nowhere = f"no CIFAR-10 in {' or '.join(map(str, places))}"
    full = _no_room(places[0])
    if full:
        return "stand-in", f"{nowhere}, and it cannot be downloaded: {full}"
    needed = ARCHIVE_SIZE / PATIENCE
    rate = probe(addresses(mirrors), ARCHIVE_SIZE, deadline - time.monotonic(), enough=4 * needed)
    if rate >= needed:
        return "cifar10", f"{nowhere}; it will be downloaded, in about {max(ARCHIVE_SIZE / rate / 60, 0.1):.1f} minutes"
    slow = f"a download would take {ARCHIVE_SIZE / rate / 60:.0f} minutes" if rate else f"no answer from {URL.split('/')[2]}"
    return "stand-in", f"{nowhere}, and {slow}"


def _no_room(folder: Path) -> str:
    """Why the archive cannot be put into `folder`, or nothing."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written"
    free = shutil.disk_usage(existing).free
    return "" if free >= ROOM else f"{existing} has {free >> 20} MiB free of the {ROOM >> 20} it takes"


def load(
    dataset: str, data_dir: Path | None = None, *, mirrors: Sequence[str] = (), progress: Progress | None = None
) -> Dataset10:
    """`cifar10` (found or downloaded, each file's MD5 checked) or `stand-in`. Raises UserError that names a bad file."""
    if dataset == "stand-in":
        made = stand_in.cached(cache_folder())
        return Dataset10(*made, name=dataset, fingerprint=stand_in.fingerprint(made), official=False, classes=stand_in.CLASSES)
    assert dataset == "cifar10", f"'{dataset}' has to be resolved first"
    path = obtain(data_dir, mirrors=mirrors, progress=progress)
    parts = [read_batch(content, str(path / name)) for name, content in _verified(path).items()]
    images, labels = [images for images, _ in parts], [labels for _, labels in parts]
    digest = hashlib.sha256(" ".join(BATCHES.values()).encode()).hexdigest()  # of the sums that were just checked
    return Dataset10(
        np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1], dataset, digest, True, CLASSES
    )


def split(labels: NDArray[np.int64], val_size: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, val) places in the training set, sorted; val has `val_size`, spread evenly over the classes."""
    assert 0 <= val_size < len(labels), val_size
    random = np.random.Generator(np.random.PCG64(seed))
    classes = np.unique(labels)
    taken = []
    for place, label in enumerate(classes):
        share = val_size // len(classes) + (place < val_size % len(classes))
        members = np.flatnonzero(labels == label)
        # ordering by raw bits: NumPy keeps those the same for ever, and a cut has to be the same for ever
        taken.append(members[np.argsort(random.bit_generator.random_raw(len(members)), kind="stable")[:share]])
    val = np.sort(np.concatenate(taken)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), val), val


# -- reading what may be damaged or hostile ----------------------------------------------------------------------------


def _verified(path: Path) -> dict[str, bytes]:
    """Name -> content of the six batch files in a folder or archive; each has its official MD5."""
    if path.is_file():
        if path.stat().st_size != ARCHIVE_SIZE or md5_of(path) != ARCHIVE_MD5:
            raise UserError(
                f"{path} is not the official CIFAR-10 archive ({path.stat().st_size:,} bytes of {ARCHIVE_SIZE:,}, "
                "or other ones: a broken download?); delete it and run again to download it, or name the right file"
            )
        content: Mapping[str, bytes] = _members(path)
    else:
        content = {name: _bytes(path / name, f"delete the folder {path} and run again to download it") for name in BATCHES}
    for name, md5 in BATCHES.items():
        if hashlib.md5(content[name], usedforsecurity=False).hexdigest() != md5:
            raise UserError(
                f"{path / name} is not the official CIFAR-10 file (its MD5 differs); copy it anew, "
                f"or delete {path} and run again to download it"
            )
    return dict(content)


def _bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def _members(archive: Path) -> dict[str, bytes]:
    """Only the six files that are expected, by name, into memory: no path from the archive is ever written to."""
    wanted = {f"{FOLDER}/{name}": name for name in BATCHES}
    content = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:  # a stream: one pass, no seeking back
            for member in tar:
                if member.name in wanted and member.isreg() and member.size < 1 << 26:
                    file = tar.extractfile(member)
                    assert file
                    content[wanted[member.name]] = file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run again to download it") from None
    missing = [name for name in BATCHES if name not in content]
    if missing:
        raise UserError(f"{archive} lacks {', '.join(missing)}; delete it and run again to download it")
    return {name: content[name] for name in BATCHES}


class _Array:
    """What `numpy.core.multiarray._reconstruct` makes while a batch file is read: it can hold bytes and do nothing."""

    def __init__(self, *_: object) -> None:
        self.value: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Kind) or kind.name not in (b"u1", "u1") or fortran:
            raise pickle.UnpicklingError("an array that is not uint8")
        self.value = np.frombuffer(content, np.uint8).reshape(shape)


class _Kind:
    """What `numpy.dtype` makes: a name."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like: nothing that matters to single bytes."""


class _Unpickler(pickle.Unpickler):
    """Knows the three names of a pickled array, and gives the two harmless classes above for them, not NumPy's own."""

    known: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _Kind,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise UserError(f"it asks for {module}.{name}, which is no part of an array")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it refers to something outside of the file")


def read_batch(content: bytes, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A pickled batch -> images (N, 3, 32, 32) and labels (N,). Runs nothing that the file asks for; `name` is for errors."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        images = batch[b"data"].value
        labels = np.array(batch[b"labels"], dtype=np.int64)
        if images.shape != (len(labels), 3072) or not ((labels >= 0) & (labels < len(CLASSES))).all():
            raise ValueError("wrong shapes or labels")
    except Exception as error:  # a hostile file can raise anything
        raise UserError(f"{name} is not a CIFAR-10 batch file ({error}); delete it and download CIFAR-10 again") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32)), labels
