"""Reading the files of tensors that runs leave: weights.pt and checkpoint.pt. No code of theirs is ever run."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar.errors import UserError
from cifar.system.files import MIB, open_file
from cifar.tracking.pretrained import check_weights
from cifar.training.rounding import restore_weights

MAX_TENSOR_BYTES = 2**37  # 128 GiB: of a whole file
MAX_PICKLE_BYTES = 4 * MIB  # of the list of tensors and the plain values in it


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote. Raises UnreadableFileError, and all kinds of errors for a damaged or hostile file.

    The archive's checksums are checked, which torch.load does not do. A compressed archive is refused: torch writes tensors as
    they are, and what is compressed could fill the memory.
    """
    with open_file(path, MAX_TENSOR_BYTES) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile("it is compressed")
            if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
                raise zipfile.BadZipFile("its list of tensors is too long")
        if archive.testzip():
            raise zipfile.BadZipFile("a checksum is wrong")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


class WrongWeightsError(UserError):
    """A file holds tensors, but not those of the network that they are loaded into."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a finished run's weights.pt into its network. Raises UserError if it is damaged, or of another network.

    Of a pretrained network, the file must be the one that its card names.
    """
    check_weights(path)
    kind = UserError
    try:
        tensors = read_tensors(path)
        is_state = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
        kind = WrongWeightsError if is_state else UserError
        model.load_state_dict(restore_weights(tensors))
    except Exception as error:  # a damaged file can raise anything; torch's own text would advise to load it unsafely
        raise kind(
            f"{path} is damaged, or does not hold the weights of this run's network; restore it, or train the run again: "
            f"python -m cifar train --from {path.parent.name}"
        ) from error
