"""The errors of a run's final evaluation, from predictions.npz: the confusion matrix and the worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar.registry import figures
from cifar.report.load import Run
from cifar.report.palette import RED
from cifar.report.style import Nothing
from cifar.system.files import MissingFileError, UnreadableFileError
from cifar.tracking import predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read_predictions(run: Run) -> dict[str, Any] | Nothing:
    """The arrays of predictions.npz. Pickled objects are refused."""
    try:
        return predictions.read_predictions(run.path)
    except MissingFileError:
        return Nothing("the run has no predictions.npz (it has not finished)")
    except (UnreadableFileError, ValueError) as error:
        reason = error.reason if isinstance(error, UnreadableFileError) else error
        return Nothing(f"predictions.npz cannot be read ({reason})")


def class_names(run: Run) -> Sequence[str]:
    return predictions.name_classes(run.dataset)


@dataclass(frozen=True)
class Counts:
    percent: Any  # (10, 10) percent of each true class
    accuracy: float  # percent
    num_images: int
    split: str
    names: Sequence[str]


@figures.register("confusion")
class Confusion:
    scope, order = "run", 30
    title = "Confusion matrix"
    caption = "Rows: the true class. Columns: what was predicted. Percent of the row's images; a row adds up to 100."

    def select(self, run: Run) -> Counts | Nothing:
        import numpy

        data = read_predictions(run)
        if isinstance(data, Nothing):
            return data
        if not len(data["label"]):
            return Nothing("predictions.npz is empty")
        counts = numpy.zeros((10, 10))
        numpy.add.at(counts, (data["label"], data["predicted"]), 1)
        share = 100 * counts / numpy.maximum(counts.sum(1, keepdims=True), 1)
        return Counts(
            share, float(100 * counts.trace() / counts.sum()), int(counts.sum()), str(data.get("split", "")), class_names(run)
        )

    def size(self, data: Counts) -> tuple[float, float]:
        return 6.2, 5.4

    def draw(self, data: Counts, figure: Figure) -> None:
        from matplotlib.colors import PowerNorm

        axes = figure.subplots()
        axes.grid(visible=False)
        axes.imshow(data.percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        for row in range(10):
            for column in range(10):
                value = data.percent[row, column]
                weight = "bold" if row == column else "normal"
                colour = "white" if value > 40 else "#1f2937"  # on a fixed colour map: not the page's ink
                text = f"{value:.0f}" if value >= 0.5 else "·"
                axes.text(column, row, text, ha="center", va="center", size=8, color=colour, weight=weight)
        axes.set_xticks(range(10), data.names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(10), data.names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{data.accuracy:.1f} % of {data.num_images:,} {data.split} images are right")


@dataclass(frozen=True)
class Mistake:
    image: Any  # (32, 32, 3) uint8
    true: str
    predicted: str
    confidence: float  # percent


@figures.register("mistakes")
class Mistakes:
    scope, order = "run", 40
    title = "Worst mistakes"
    caption = "The images that the network got wrong with the most confidence: what they are, and in red what it said."

    def select(self, run: Run) -> list[Mistake] | Nothing:
        data = read_predictions(run)
        if isinstance(data, Nothing):
            return data
        names = class_names(run)
        row_of_index = {int(index): i for i, index in enumerate(data["index"])}
        mistakes = []
        for image, index in zip(data["worst_images"], data["worst_index"], strict=True):
            i = row_of_index.get(int(index))
            if i is not None and data["label"][i] != data["predicted"][i]:
                true, predicted = names[data["label"][i]], names[data["predicted"][i]]
                mistakes.append(Mistake(image.transpose(1, 2, 0), true, predicted, 100 * float(data["confidence"][i])))
        return mistakes[:25] or Nothing("no image was wrong")

    def size(self, data: list[Mistake]) -> tuple[float, float]:
        return 6.6, 1.72 * -(-len(data) // 5)

    def draw(self, data: list[Mistake], figure: Figure) -> None:
        axes = figure.subplots()  # one for all: 25 axes take a second to lay out
        axes.set_axis_off()
        for i, mistake in enumerate(data):
            x, y = i % 5, 1.32 * (i // 5)
            axes.imshow(mistake.image, interpolation="nearest", extent=(x, x + 0.92, y + 0.92, y))
            axes.text(x + 0.46, y - 0.03, mistake.true, size=8, ha="center", va="bottom")
            said = f"{mistake.predicted} {mistake.confidence:.0f} %"
            axes.text(x + 0.46, y + 0.95, said, size=8, color=RED, ha="center", va="top")
        axes.set_xlim(0, 4.92)
        axes.set_ylim(1.32 * ((len(data) - 1) // 5) + 1.12, -0.18)
