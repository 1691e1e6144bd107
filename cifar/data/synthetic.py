"""The stand-in: a generated data set in CIFAR-10's form, for computers that CIFAR-10 cannot be downloaded to.

A class is a shape (disc, square, triangle, ring, cross) filled with a texture (stripes, checks). Position, size, angle,
colours, background texture, clutter and noise do not depend on the class. So a linear model of the pixels stays near chance:
to tell the classes apart takes local features and their combination, and larger networks do better. It is no benchmark.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar.system.files import read_arrays

Floats = NDArray[np.float32]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]

SHAPES, TEXTURES = ("disc", "square", "triangle", "ring", "cross"), ("striped", "checked")
CLASSES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
SEED, TRAIN, TEST, SIDE, CHUNK = 10, 50_000, 10_000, 32, 100
FINGERPRINT = (
    "3b5bca02f11e220e8400dffa498858bf57a2b82dce0ebf7907b5fff43531b7ae"  # SHA-256 of the four arrays' bytes, on every machine
)
MAX_CACHE_BYTES = 2**28  # its arrays have 185 MB
VERSION = 1  # part of the cached file's name; raise it when a picture changes


class PortableRandom:
    """Uniform random numbers from the raw bits of PCG64: NumPy never changes those, but may change its distributions."""

    def __init__(self, *seed: int) -> None:
        self.source = np.random.PCG64(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Floats:
        raw = np.asarray(self.source.random_raw(int(np.prod(shape))), np.uint64)
        unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        return (unit * np.float32(high - low) + np.float32(low)).reshape(shape)

    def random_bools(self, *shape: int) -> NDArray[np.bool_]:
        return self.uniform(0, 1, *shape) < 0.5

    def random_bytes(self, *shape: int) -> NDArray[np.uint8]:
        count = int(np.prod(shape))
        raw = np.asarray(self.source.random_raw(-(-count // 8)), "<u8")
        return raw.view(np.uint8)[:count].reshape(shape)


def generate_arrays() -> Arrays:
    """Train images (50000, 3, 32, 32) uint8, labels (50000,) int64, and 10,000 test images and labels. Same everywhere.

    Only + - * / abs and floor on float32 are used, each correctly rounded by IEEE 754, so all machines agree to the bit.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        chunks = list(pool.map(_generate_chunk, range((TRAIN + TEST) // CHUNK)))
    images = np.concatenate([images for images, _ in chunks])
    labels = np.concatenate([labels for _, labels in chunks])
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def hash_arrays(arrays: Arrays) -> str:
    """SHA-256 over the bytes of the four arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def load_or_generate(folder: Path) -> Arrays:
    """`generate_arrays()`, cached in `folder` if that can be written. A damaged file is made again."""
    path = folder / f"stand-in-v{VERSION}.npz"
    arrays = _read_cache(path)
    if arrays is not None:
        return arrays
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".stand-in.lock", timeout=60):
            arrays = _read_cache(path)  # another process may have made it in the meantime
            if arrays is None:
                arrays = generate_arrays()
                _write_cache(path, arrays)
        return arrays
    except (OSError, Timeout, NotImplementedError):  # no cache then; NotImplementedError: no locks on this file system
        return arrays if arrays is not None else generate_arrays()


def load_with_fingerprint(folder: Path) -> tuple[Arrays, str]:
    """`load_or_generate(folder)` and the SHA-256 of its arrays, worked out once: a cached file is read only if it fits."""
    arrays = _read_cache(folder / f"stand-in-v{VERSION}.npz")
    if arrays is not None:
        return arrays, FINGERPRINT
    arrays = load_or_generate(folder)
    return arrays, hash_arrays(arrays)


def _read_cache(path: Path) -> Arrays | None:
    with contextlib.suppress(Exception):  # whatever is wrong with a cached file, the answer is to make it again
        file = read_arrays(path, MAX_CACHE_BYTES)
        arrays: Arrays = (file["train_images"], file["train_labels"], file["test_images"], file["test_labels"])
        if hash_arrays(arrays) == FINGERPRINT:
            return arrays
    return None


def _write_cache(path: Path, arrays: Arrays) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            images, labels, test_images, test_labels = arrays
            np.savez(file, train_images=images, train_labels=labels, test_images=test_images, test_labels=test_labels)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _generate_chunk(number: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """100 images, 10 of each class. Chunks are independent, so threads may make them in any order."""
    draws, n = PortableRandom(SEED, number), CHUNK
    labels = (np.argsort(draws.uniform(0, 1, n), kind="stable") % len(CLASSES)).astype(np.int64)
    shape, checked = labels % len(SHAPES), labels >= len(SHAPES)

    ground = draws.uniform(40, 215, n, 3, 1, 1)
    ramp = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    images = ground + draws.uniform(-2, 2, n, 3, 1, 1) * ramp + draws.uniform(-2, 2, n, 3, 1, 1) * ramp[:, None]
    u, v = _draw_frame(draws, n, spread=8, smallest=1, largest=1)
    images += _draw_texture(draws, draws.random_bools(n), u, v) * draws.uniform(
        0, 20, n, 3, 1, 1
    )  # background of either texture

    for _ in range(2):  # clutter: small plain shapes
        u, v = _draw_frame(draws, n, spread=18, smallest=2, largest=6)
        kind = np.floor(draws.uniform(0, len(SHAPES), n)).astype(np.int64)
        np.copyto(images, draws.uniform(20, 235, n, 3, 1, 1), where=_mask_shape(kind, u, v))

    u, v = _draw_frame(draws, n, spread=4, smallest=8, largest=13)
    inside = _mask_shape(shape, u, v)
    u, v = _draw_frame(draws, n, spread=4, smallest=1, largest=1)  # the texture's angle is not the shape's
    texture = _draw_texture(draws, checked, u, v)
    contrast = np.where(draws.random_bools(n, 3, 1, 1), np.float32(1), np.float32(-1)) * draws.uniform(55, 115, n, 3, 1, 1)
    waves = np.where(draws.uniform(0, 1, n, 3, 1, 1) < 0.8, np.float32(1), np.float32(-1)) * draws.uniform(45, 85, n, 1, 1, 1)
    np.copyto(images, ground + contrast + texture * waves, where=inside)

    noise = draws.random_bytes(2, n, 3, SIDE, SIDE).astype(np.int16)  # the sum of two bytes: a triangular distribution
    images += (noise[0] + noise[1] - np.int16(255)) * draws.uniform(0.06, 0.2, n, 1, 1, 1)
    return np.clip(np.rint(images, out=images), 0, 255, out=images).astype(np.uint8), labels


def _draw_frame(draws: PortableRandom, n: int, *, spread: float, smallest: float, largest: float) -> tuple[Floats, Floats]:
    """Pixel coordinates (n, 32, 32) relative to a random centre, at a random angle, in units of a random size in pixels."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    row, column = draws.uniform(SIDE / 2 - spread, SIDE / 2 + spread, 2, n, 1, 1)
    size, t = draws.uniform(smallest, largest, n, 1, 1), draws.uniform(-1, 1, n, 1, 1)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # rational: sin and cos differ between machines
    is_mirrored = draws.random_bools(n, 1, 1)  # t alone reaches half of the circle
    cosine, sine = np.where(is_mirrored, cosine, -cosine), np.where(is_mirrored, sine, -sine)
    x, y = (x + np.float32(0.5) - column) / size, (y + np.float32(0.5) - row) / size
    return x * cosine + y * sine, y * cosine - x * sine


def _draw_texture(draws: PortableRandom, checked: NDArray[Any], u: Floats, v: Floats) -> Floats:
    """Stripes along v, or checks, in -1..1: (n, 1, 32, 32). Wavelengths of 3.3 to 5.6 pixels."""
    frequency = draws.uniform(0.18, 0.3, len(u), 1, 1)
    a, b = _triangle_wave((u + 40) * frequency), _triangle_wave((v + 40) * frequency)
    size = np.maximum(np.abs(a), np.abs(b))
    checks = np.where(a * b > 0, size, -size)
    return np.asarray(np.where(checked[:, None, None], checks, a)[:, None])


def _triangle_wave(x: Floats) -> Floats:
    """A triangle wave of period 1, in -1..1."""
    return np.asarray(4 * np.abs(x - np.floor(x) - np.float32(0.5)) - 1)


def _mask_shape(shape: NDArray[np.int64], u: Floats, v: Floats) -> NDArray[np.bool_]:
    """Which pixels a shape of about radius 1 covers: (n, 1, 32, 32)."""
    inside = np.empty(u.shape, np.bool_)
    for number in range(len(SHAPES)):
        chosen = shape == number
        inside[chosen] = _SHAPE_TESTS[number](u[chosen], v[chosen])
    return inside[:, None]


_SHAPE_TESTS: tuple[Callable[[Floats, Floats], Any], ...] = (  # in the order of SHAPES
    lambda u, v: u * u + v * v < 1,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) < np.float32(0.88),
    lambda u, v: np.maximum(np.abs(u) * np.float32(1.7) + v, v * np.float32(-1.6)) < np.float32(0.95),
    lambda u, v: np.abs(u * u + v * v - np.float32(0.75)) < np.float32(0.4),
    lambda u, v: (np.minimum(np.abs(u), np.abs(v)) < np.float32(0.33)) & (np.maximum(np.abs(u), np.abs(v)) < np.float32(1.15)),
)
