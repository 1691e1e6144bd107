"""Sends a finished run's artifacts: the dataset that it used, its model, and what it predicted.

Online and offline alike: an offline file holds the same records, and `wandb sync` sends the files from the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cifar.integrations.wandb import artifact_arrival, artifact_best, artifact_choice, artifacts
from cifar.integrations.wandb.arrival import ArrivedRun
from cifar.integrations.wandb.artifacts import DATASET, MODEL, PREDICTIONS
from cifar.integrations.wandb.feed import Feed
from cifar.integrations.wandb.mirror_process import is_core_death, list_core_pids
from cifar.integrations.wandb.settings import Mode
from cifar.system.names import escape_controls
from cifar.system.redact import redact
from cifar.system.variables import read_variable
from cifar.tracking import predictions
from cifar.tracking.run_dir import RunDir, write_atomic

FOLDER = "artifacts"  # in RUN/wandb: files of artifacts that the run's folder has in another form
COPIES = "copies"  # in that: wandb's copies of files
FIRST_DATASET_SECONDS = 10.0  # how long to wait for the first dataset that this process sends
MIN_UPLOAD_RATE = 100_000  # bytes a second: a slower upload is given up for now
_DATA_DIR = "WANDB_DATA_DIR"  # where wandb keeps copies of an artifact's files until they are sent

_known_datasets: set[tuple[str, str, str]] = set()  # entity, project, fingerprint: W&B has these
_told_sweeps: set[str] = set()  # of which was said that not all their models are sent


class _Upload(threading.Thread):
    """Waits until W&B has an artifact. A thread, because a wait that ends early would take the upload back."""

    def __init__(self, kind: str, artifact: Any) -> None:
        super().__init__(daemon=True)
        self.kind, self.artifact = kind, artifact
        self.error: Exception | None = None  # why W&B has not taken it
        self.start()

    def run(self) -> None:
        try:
            self.artifact.wait()
        except Exception as error:  # wandb raises many kinds of errors
            self.error = error


class ArtifactFeed(Feed):
    """One for each run. Nothing that fails here keeps the rest of the run from W&B: it is said, and `push` tries again."""

    def __init__(self, run_dir: RunDir, on_message: Callable[[str], None]) -> None:
        super().__init__(run_dir, on_message)
        self._arrived: ArrivedRun | None = None
        self._is_sent = False
        self._uploads: list[_Upload] = []  # that have not ended
        self._num_bytes = 0  # of what is being uploaded

    def open(self, run: Any, arrived: ArrivedRun | None, mode: Mode) -> None:
        super().open(run, arrived, mode)
        self._arrived, self._is_sent, self._uploads, self._num_bytes = arrived, False, [], 0

    def finish(self) -> None:
        if self._is_sent:
            return
        self._is_sent = True
        arrived = self._arrived.artifacts if self._arrived and self.mode == "online" else ()
        for kind in artifact_arrival.list_missing(arrived, self.run_dir):
            try:
                self._send_artifact(kind)
            except Exception as error:  # wandb raises many kinds of errors; a damaged file can raise anything
                if is_core_death(error) or not list_core_pids():
                    raise
                self._say_failed(kind, error)
        self._tell_limit()

    def has_arrived(self, patience: float) -> bool:
        if patience >= 1.0:
            patience = max(patience, self._num_bytes / MIN_UPLOAD_RATE)
        deadline = time.monotonic() + patience
        while self._uploads:
            upload = self._uploads[0]
            upload.join(max(0.0, deadline - time.monotonic()))
            if upload.is_alive():
                return False
            if upload.error:
                if is_core_death(upload.error) or not list_core_pids():
                    raise upload.error
                self._say_failed(upload.kind, upload.error)
            del self._uploads[0]
        if self._is_sent and self.mode == "online":
            shutil.rmtree(self.run_dir.path / "wandb" / FOLDER / COPIES, ignore_errors=True)
        if MODEL in artifact_arrival.list_kinds(self.run_dir):
            artifact_best.mark(self.run_dir, self.run.entity, self.run.project)
        return True

    def _say_failed(self, kind: str, error: Exception) -> None:
        reason = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
        self.on_message(f"{self.run_dir.id}: W&B did not take its {kind} artifact ({reason}); `push` tries again")

    def _tell_limit(self) -> None:
        about = self.run_dir.read_json("run")
        sweep = str(about.get("sweep") or "")
        is_asked = sweep not in _told_sweeps and self.run_dir.state == "finished" and artifacts.is_enabled(self.run_dir)
        if is_asked and artifact_choice.is_above_limit(self.run_dir):
            _told_sweeps.add(sweep)
            self.on_message(
                f"sweep {sweep} has more than {artifact_choice.MAX_RUNS} runs or 2 GiB of weights: "
                "from here on, W&B gets the models and predictions of the best ten and of the front"
            )

    # -- sending --

    def _send_artifact(self, kind: str) -> None:
        if kind == DATASET:
            if self.mode == "online" or artifact_best.take_dataset_offline(self.run_dir):
                self._send_dataset()
        elif kind == MODEL:
            self._send_model()
        else:
            self._send_predictions()

    def _log(self, kind: str, artifact: Any, aliases: list[str]) -> None:
        self.run.log_artifact(artifact, aliases=aliases)
        self._num_bytes += artifact.size
        if self.mode == "online":
            self._uploads.append(_Upload(kind, artifact))

    def _send_dataset(self) -> None:
        """Make the dataset a version, unless W&B has it, and say that the run uses it.

        run.use_artifact would do the same, but it waits for the server, and refuses to work offline, where there is nothing to
        wait for: the record says "use it once it is there", and `wandb sync` does so. So its private half is called.
        """
        import wandb

        about = self.run_dir.read_json("run")
        metadata = artifacts.build_dataset_metadata(self.run_dir)
        artifact = wandb.Artifact(artifacts.collection_name(DATASET, about), type=DATASET, metadata=metadata)
        address, name = artifacts.dataset_reference(self.run_dir)
        with contextlib.redirect_stderr(None):  # it warns of addresses that it cannot read
            artifact.add_reference(address, name=name, checksum=False)
        place = (str(self.run.entity), str(self.run.project), str(metadata["data_fingerprint"]))
        with self._own_first_dataset(place) as is_first:
            self.run._log_artifact(artifact, aliases=["latest"], is_user_created=True, use_after_commit=True)
            if self.mode == "online":
                self._uploads.append(_Upload(DATASET, artifact))
                if is_first and self.has_arrived(FIRST_DATASET_SECONDS):
                    _known_datasets.add(place)

    @contextlib.contextmanager
    def _own_first_dataset(self, place: tuple[str, str, str]) -> Iterator[bool]:
        """One process at a time sends a dataset for the first time: two at once would make two versions of the same."""
        if self.mode != "online" or place in _known_datasets:
            yield False
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(Timeout, OSError):
                stack.enter_context(FileLock(artifact_best.dataset_lock_file(self.run_dir), timeout=FIRST_DATASET_SECONDS))
            yield True

    def _send_model(self) -> None:
        import wandb

        about = self.run_dir.read_json("run")
        name = artifacts.collection_name(MODEL, about)
        artifact = wandb.Artifact(name, type=MODEL, metadata=artifacts.build_metadata(self.run_dir))
        weights = self.run_dir.path / artifacts.WEIGHTS_FILE
        artifact.add_file(str(weights), name=artifacts.WEIGHTS_FILE, policy="immutable", skip_cache=True)
        for file in artifacts.RECORD_FILES:
            self._add_record_file(artifact, file)
        aliases = ["latest", artifacts.run_alias(self.run_dir.id)]
        if self.mode == "offline" and artifact_best.take_offline(self.run_dir):
            aliases.append(artifact_best.BEST)
        self._log(MODEL, artifact, aliases)

    def _send_predictions(self) -> None:
        import wandb

        arrays = predictions.read_predictions(self.run_dir.path)
        about = self.run_dir.read_json("run")
        names = predictions.name_classes(str(about.get("dataset")))
        metadata = {**artifacts.build_metadata(self.run_dir), "split": str(arrays.get("split", ""))}
        artifact = wandb.Artifact(artifacts.collection_name(PREDICTIONS, about), type=PREDICTIONS, metadata=metadata)
        self._add_record_file(artifact, "run.json")
        with self._keep_copies_here():
            artifact.add(build_mistakes_table(arrays, names), "worst_mistakes")
            artifact.add(build_classes_table(arrays, names), "classes")
        self._log(PREDICTIONS, artifact, ["latest", artifacts.run_alias(self.run_dir.id)])

    def _add_record_file(self, artifact: Any, file: str) -> None:
        """A copy without secrets. run.json has the run's id, so no two runs have the same content: W&B keeps one of such."""
        path = self._make_folder() / file
        write_atomic(path, json.dumps(artifacts.build_record_file(self.run_dir, path.stem), indent=1).encode())
        artifact.add_file(str(path), name=file, policy="immutable", skip_cache=True)

    def _make_folder(self) -> Path:
        folder = self.run_dir.path / "wandb" / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextlib.contextmanager
    def _keep_copies_here(self) -> Iterator[None]:
        """Let wandb keep its copies of an artifact's files in the run's folder, where `wandb sync` finds them, not at home."""
        before = read_variable(_DATA_DIR)
        folder = self._make_folder() / COPIES
        shutil.rmtree(folder, ignore_errors=True)
        os.environ[_DATA_DIR] = str(folder)
        try:
            yield
        finally:
            if before:
                os.environ[_DATA_DIR] = before
            else:
                del os.environ[_DATA_DIR]


def build_mistakes_table(arrays: dict[str, Any], names: Any) -> Any:
    """A row for each of the most confident mistakes. `arrays`: of predictions.npz."""
    import wandb

    by_index = {int(index): n for n, index in enumerate(arrays["index"])}
    rows = []
    for index, image in zip(arrays["worst_index"], arrays["worst_images"], strict=True):
        n = by_index[int(index)]
        label, predicted = names[int(arrays["label"][n])], names[int(arrays["predicted"][n])]
        picture = wandb.Image(image.transpose(1, 2, 0))  # (3, 32, 32) -> (32, 32, 3)
        rows.append([picture, int(index), label, predicted, float(arrays["confidence"][n])])
    return wandb.Table(columns=["image", "index", "class", "predicted", "confidence"], data=rows)


def build_classes_table(arrays: dict[str, Any], names: Any) -> Any:
    """A row for each class: how many images it has, and the share that was recognised."""
    import wandb

    rows = []
    for label, name in enumerate(names):
        mine = arrays["label"] == label
        num_images, num_right = int(mine.sum()), int((arrays["predicted"][mine] == label).sum())
        rows.append([escape_controls(name), num_images, num_right, num_right / num_images if num_images else None])
    return wandb.Table(columns=["class", "images", "right", "accuracy"], data=rows)
