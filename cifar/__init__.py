"""CIFAR-10 experiments: a sweep file -> trials -> accuracy against FLOPs. The command line is `python -m cifar`.

In a notebook:

    cifar.runs("SWEEP")        # a table of its runs: swept keys, accuracies, MACs; .to_pandas() makes a DataFrame
    cifar.load("RUN")          # a run's trained model, ready to be asked; or a pretrained one, as "frontier-28m"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported when they are used: `import cifar` costs nothing
    from torch import nn

    from cifar.report.table import Table

    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name == "__version__":  # reading it takes some milliseconds, and few ask for it
            return _find_version()
        raise AttributeError(f"module 'cifar' has no attribute '{name}'")


def _find_version() -> str:
    """The version of the installed package; of a checkout that is not installed, the one of its pyproject.toml."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cifar")
    except PackageNotFoundError:
        text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
        return str(tomllib.loads(text)["project"]["version"])


def load(run: str | Path, runs_dir: str | Path | None = None) -> nn.Module:
    """The model of a finished run (id, start of an id, name or path) on the CPU, in evaluation mode.

    The name of a pretrained network (`python -m cifar models --pretrained` lists them), as in `cifar.load("frontier-28m")`,
    gives that one; its file must have the SHA-256 that its card says.
    ENTITY/PROJECT/NAME:ALIAS names a model artifact on W&B, as in `cifar.load("me/cifar/model-3k9x2m1p:best")`.
    It takes images (B, 3, 32, 32) normalised as the run's `normalize` says: `cifar.data.normalize(uint8, kind)`.
    Raises UserError where there is no such network, or its weights are damaged or not installed.
    """
    import warnings

    from cifar.integrations.wandb.artifact_download import find_run
    from cifar.tracking import run_dir
    from cifar.training.recorded import describe_changes, load_model

    found = find_run(str(run), run_dir.resolve_runs_dir(Path(runs_dir) if runs_dir else None))
    model = load_model(found).eval()
    for change in describe_changes(found, ("model",)):
        warnings.warn(f"{change}: this is the network as the file has it now", stacklevel=2)
    return model


def runs(*names: str, runs_dir: str | Path | None = None) -> Table:
    """A row for each run of the named sweeps and runs; without a name, of the newest sweep."""
    from cifar.report.load import collect_runs
    from cifar.report.table import runs_table
    from cifar.tracking.run_dir import resolve_runs_dir

    return runs_table(collect_runs(names, resolve_runs_dir(Path(runs_dir) if runs_dir else None)).runs)
