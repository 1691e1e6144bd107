"""The generated set is the same everywhere, and hard in the way that is promised."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from cifar.data import cifar10, synthetic
from cifar.data.synthetic import Arrays


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return synthetic.load_or_generate(cifar10.cache_folder())


@pytest.fixture
def two_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of 100 + 100 images, for what concerns the cached file."""
    monkeypatch.setattr(synthetic, "TRAIN", 100)
    monkeypatch.setattr(synthetic, "TEST", 100)
    monkeypatch.setattr(synthetic, "FINGERPRINT", synthetic.hash_arrays(synthetic.generate_arrays()))


def test_has_the_form_of_cifar10(arrays: Arrays) -> None:
    train_images, train_labels, test_images, test_labels = arrays
    assert train_images.shape == (50000, 3, 32, 32) and test_images.shape == (10000, 3, 32, 32)
    assert train_images.dtype == test_images.dtype == np.uint8 and train_labels.dtype == test_labels.dtype == np.int64
    assert np.bincount(train_labels).tolist() == [5000] * 10 and np.bincount(test_labels).tolist() == [1000] * 10
    assert len({image.tobytes() for image in np.concatenate([train_images, test_images])}) == 60000  # no image twice


def test_is_the_same_on_every_machine(arrays: Arrays) -> None:
    assert synthetic.hash_arrays(arrays) == synthetic.FINGERPRINT
    images, labels = synthetic._generate_chunk(499)  # alone, out of turn, on this thread
    assert np.array_equal(images, arrays[0][-100:]) and np.array_equal(labels, arrays[1][-100:])
    images, labels = synthetic._generate_chunk(599)
    assert np.array_equal(images, arrays[2][-100:]) and np.array_equal(labels, arrays[3][-100:])


def test_generating_takes_seconds() -> None:
    seconds = []
    for number in range(20):
        start = time.thread_time()
        synthetic._generate_chunk(number)
        seconds.append(time.thread_time() - start)
    assert min(seconds) * 600 < 10, "CPU seconds for the whole set, on a machine that may be busy"


def test_a_linear_model_stays_below_45_percent(arrays: Arrays) -> None:
    """Softmax regression on pixels, driven to its optimum by L-BFGS on the 192 strongest principal components (which keep
    most of the variance), so that it is not overfitting that fails it."""
    train, train_labels = arrays[0][:16000].reshape(16000, -1), arrays[1][:16000]
    test, test_labels = arrays[2].reshape(10000, -1), arrays[3]
    mean = train.mean(0, dtype=np.float64).astype(np.float32)
    centred = train - mean
    _, combined = np.linalg.eigh(centred[:2000] @ centred[:2000].T)
    basis = np.linalg.qr(centred[:2000].T @ combined[:, -192:])[0]
    x = centred @ basis
    scale = x.std(0)
    x, x_test = np.c_[x / scale, np.ones(len(x))], np.c_[(test - mean) @ basis / scale, np.ones(len(test))]
    onehot = np.eye(10)[train_labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, 10)
        logits = x @ weights
        logits -= logits.max(1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        gradient = x.T @ (np.exp(logp) - onehot) / len(x) + 1e-4 * weights
        return float(-(logp * onehot).sum() / len(x) + 5e-5 * (weights**2).sum()), gradient.ravel()

    found = minimize(loss, np.zeros(x.shape[1] * 10), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    assert np.abs(found.jac).max() < 1e-3, "not converged"
    weights = found.x.reshape(-1, 10)
    train_accuracy = (np.argmax(x @ weights, 1) == train_labels).mean()
    accuracy = (np.argmax(x_test @ weights, 1) == test_labels).mean()
    print(f"linear probe: train {train_accuracy:.3f}, test {accuracy:.3f}")
    assert 0.08 < accuracy < 0.45


@pytest.mark.usefixtures("two_chunks")
def test_is_cached_and_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    first = synthetic.load_or_generate(tmp_path)
    (file,) = tmp_path.glob("stand-in*")
    made = file.stat().st_mtime_ns
    assert synthetic.hash_arrays(synthetic.load_or_generate(tmp_path)) == synthetic.hash_arrays(first)
    assert file.stat().st_mtime_ns == made, "the second call reads"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    assert synthetic.hash_arrays(synthetic.load_or_generate(tmp_path)) == synthetic.hash_arrays(first)
    assert file.read_bytes() != bytes(content) and [p.name for p in tmp_path.iterdir() if p.name[0] != "."] == [file.name]


@pytest.mark.usefixtures("two_chunks")
def test_works_where_the_cache_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert synthetic.hash_arrays(synthetic.load_or_generate(tmp_path / "file" / "cache")) == synthetic.FINGERPRINT


@pytest.mark.usefixtures("two_chunks")
def test_many_at_once_get_the_same(tmp_path: Path) -> None:
    got: list[str] = []
    threads = [
        threading.Thread(target=lambda: got.append(synthetic.hash_arrays(synthetic.load_or_generate(tmp_path))))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [synthetic.FINGERPRINT] * 6


def test_load_says_that_it_is_not_official(arrays: Arrays) -> None:
    data = cifar10.load_dataset("stand-in")
    assert (data.name, data.official, len(data.classes)) == ("stand-in", False, 10)
    assert data.fingerprint == synthetic.FINGERPRINT and np.array_equal(data.test_labels, arrays[3])
