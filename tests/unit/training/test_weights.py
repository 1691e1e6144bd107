"""weights.pt that is cut off, garbage, of another network or hostile: one sentence, and no code of it runs."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import cifar
from cifar import registry
from cifar.errors import UserError
from cifar.training.weights import load_weights, read_tensors
from helpers import hostile
from helpers.fake_runs import write


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/cifar-test-of-weights-ran-code",)


def save(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rezip(content: bytes, **options: Any) -> bytes:
    """The same archive, written anew: compressed, or with another file in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return buffer.getvalue()


def make_contents() -> dict[str, bytes]:
    model = registry.models["conv4"].build()
    whole = save(model.state_dict())
    tensors = dict(model.state_dict())
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    return {
        "cut off": whole[: len(whole) // 2],
        "empty": b"",
        "garbage": bytes(range(256)) * 50,
        "a flipped bit": bytes(flipped),
        "another shape": save({name: torch.zeros(3, 3) for name in tensors}),
        "another network": save(registry.models["conv8"].build().state_dict()),
        "a tensor too few": save({name: tensors[name] for name in list(tensors)[1:]}),
        "no tensors": save(dict.fromkeys(tensors, "text")),
        "a list": save([1, 2]),
        "a number": save(5),
        "code": save({"x": Hostile()}),
        "a bare pickle": pickle.dumps(Hostile()),
        "compressed": rezip(whole, compression=zipfile.ZIP_DEFLATED),
    }


@pytest.mark.parametrize("what", make_contents())
def test_damaged_weights_are_one_sentence(tmp_path: Path, what: str) -> None:
    run = write(tmp_path, "one", model="conv4")
    (run.path / "config.json").write_text('{"model": "conv4", "dataset": "stand-in"}')
    (run.path / "weights.pt").write_bytes(make_contents()[what])
    with pytest.raises(UserError, match=r"weights\.pt is damaged, or does not hold .*--from one$") as caught:
        cifar.load("one", tmp_path)
    assert len(str(caught.value)) < 500 and "weights_only" not in str(caught.value)
    assert not Path("/tmp/cifar-test-of-weights-ran-code").exists()


@pytest.mark.parametrize(
    "kind", [kind for kind in hostile.KINDS if kind not in ("nothing", "link to nothing", "link to itself")]
)
def test_what_stands_in_the_place_of_weights_is_one_sentence(tmp_path: Path, kind: str) -> None:
    run = write(tmp_path, "one", model="conv4")
    (run.path / "config.json").write_text('{"model": "conv4", "dataset": "stand-in"}')
    hostile.place_input(hostile.Input(kind=kind), run.path / "weights.pt")
    with pytest.raises(UserError, match="damaged"):
        cifar.load("one", tmp_path)


def test_whole_weights_are_loaded_to_the_bit(tmp_path: Path) -> None:
    model, other = registry.models["conv4"].build(), registry.models["conv4"].build()
    (tmp_path / "weights.pt").write_bytes(save(model.state_dict()))
    load_weights(other, tmp_path / "weights.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert read_tensors(tmp_path / "weights.pt").keys() == model.state_dict().keys()


def test_a_list_of_tensors_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(save({"x": list(range(1_500_000))}))
    with pytest.raises(zipfile.BadZipFile, match="too long"):
        read_tensors(tmp_path / "x.pt")
