"""The command `export`: the network of a run, or a pretrained one, as a file for other programs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cifar.cli.completion import complete_run_or_pretrained
from cifar.cli.console import echo, print_json, redirect_messages, spinner, warn
from cifar.cli.options import DataDir, Json, RunsDir
from cifar.errors import UserError
from cifar.system.files import is_regular_file
from cifar.tracking import run_dir
from cifar.tracking.pretrained import is_pretrained, read_card

if TYPE_CHECKING:
    from torch import Tensor

    from cifar.config.schema import Settings


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="a run or a pretrained network", autocompletion=complete_run_or_pretrained)
    ],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE.onnx", help="where the ONNX file goes")],
    split: Annotated[
        Literal["val", "test"] | None,
        typer.Option("--split", help="compare the accuracy on these images [default: val; of a pretrained network: test]"),
    ] = None,
    data_dir: DataDir = None,
    runs_dir: RunsDir = None,
    as_json: Json = False,
) -> int:
    """Write a network as an ONNX file, and check it in ONNX Runtime: the same logits, and the same accuracy.

    The file takes raw images, (batch, 3, 32, 32) uint8; their normalisation is inside. It needs `pip install 'cifar[onnx]'`.

    Example: `python -m cifar export RUN --onnx network.onnx`
    """
    from cifar.integrations.wandb.artifact_download import find_run

    if not onnx.absolute().parent.is_dir():
        raise UserError(f"--onnx: the folder {onnx.absolute().parent} does not exist; make it first, or name another file")
    if onnx.is_dir():
        raise UserError(f"--onnx: {onnx} is a folder; name a file, as in --onnx {onnx / 'network.onnx'}")
    if os.path.lexists(onnx) and not is_regular_file(onnx):
        raise UserError(f"--onnx: {onnx} is no ordinary file, and would be replaced; name another one")
    record = find_run(run, run_dir.resolve_runs_dir(runs_dir))
    card = read_card(record.path) if is_pretrained(record.path) else {}
    with redirect_messages(as_json):
        with spinner("importing PyTorch ..."):
            from cifar.training import onnx_export
            from cifar.training.pixels import PixelNetwork, count_right
            from cifar.training.recorded import describe_changes, evaluation_settings, load_model
        onnx_export.check_packages()
        settings = evaluation_settings(record)
        if split == "val" and not settings.val_size:
            raise UserError(f"run {record.id} was trained on all images (val_size 0); add --split test, or leave it out")
        network = PixelNetwork(load_model(record), settings.normalize).eval()
        for change in describe_changes(record, ("model",)):
            warn(f"{change}: this is the network as the file has it now")
        try:
            with spinner("exporting ..."):
                content = onnx_export.export_onnx(network, onnx_export.describe_metadata(record.id, settings.normalize, card))
            predict = onnx_export.open_session(content)
            difference = onnx_export.compare_logits(network, predict)
        except UserError as error:
            raise UserError(f"run {record.id} (model '{settings.model}'): {error}") from error
        try:
            run_dir.write_atomic(onnx, content)
        except OSError as error:
            raise UserError(f"--onnx: {onnx} cannot be written ({error.strerror}); name another file") from error
        echo(f"written     {onnx}, {len(content) / 1e6:.2f} MB")
        echo(f"logits      as PyTorch's, within {difference:.1e} of the largest, in batches of {onnx_export.CHECKED_BATCHES}")
        split = split or ("test" if card else "val" if settings.val_size else None)
        report: dict[str, Any] = {"file": str(onnx), "bytes": len(content), "largest_difference": difference, "split": None}
        if found := _find_images(settings, split, data_dir):
            with spinner(f"scoring {split} twice ..."):
                accuracies = []
                for function in (network, predict):
                    right, total = count_right(function, *found)
                    accuracies.append(int(right.sum()) / int(total.sum()))
            echo(f"{split:11} accuracy {100 * accuracies[1]:.2f} % in ONNX Runtime, {100 * accuracies[0]:.2f} % in PyTorch")
            report |= {"split": split, "accuracy": accuracies[1], "torch_accuracy": accuracies[0], "images": len(found[1])}
        else:
            echo(f"accuracy    not compared: {_say_why(split)}")
    if as_json:
        print_json(report)
    return 0


def _find_images(settings: Settings, split: str | None, data_dir: Path | None) -> tuple[Tensor, Tensor] | None:
    """The images (N, 3, 32, 32) uint8 and labels (N,) of a split, where the data set is here already."""
    import torch

    from cifar import data

    if split is None or (settings.dataset == "cifar10" and data.find_cifar10(data_dir) is None):
        return None
    images = data.load_dataset(settings.dataset, data_dir)
    if split == "test":
        return torch.tensor(images.test_images), torch.tensor(images.test_labels)
    _, chosen = data.split_indices(images.train_labels, settings.val_size)
    return torch.tensor(images.train_images[chosen]), torch.tensor(images.train_labels[chosen])


def _say_why(split: str | None) -> str:
    if split is None:
        return "the run has no validation images; --split test takes the test images"
    return "CIFAR-10 is not here; `python -m cifar data` finds or downloads it"
