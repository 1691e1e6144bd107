"""A run with teachers learns what a plain loop of distillation learns, from teachers that it may have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar import data
from cifar.config.resolve import parse_pairs, resolve_config
from cifar.config.schema import Settings
from cifar.errors import PartError, UserError
from cifar.tracking.run_dir import RunDir
from cifar.training import run
from cifar.training.loop import RunHooks, RunLoop
from cifar.training.recorded import load_model
from cifar.training.step import Distillation, ForwardOptions, forward
from cifar.training.teachers import Renormalised, describe_leak
from cifar.training.trainer import Trainer
from helpers.run_configs import TINY
from helpers.weights import hash_run, hash_weights

STUDENT: dict[str, Any] = {
    **TINY, "width": 4, "epochs": 1, "max_steps": 4, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": False,
    "weight_decay": 0.0, "distill_weight": 0.7, "distill_temperature": 3.0, "probes": "none",
}  # fmt: skip


def train(runs: Path, values: dict[str, Any], run_id: str, hooks: RunHooks | None = None) -> RunDir:
    config = resolve_config(values)
    record = run.create_run(config, runs, run.RunMetadata(run_id=run_id))
    if run.train_run(config, record, hooks=hooks) == "finished":
        assert record.state == "finished"
    return record


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with two teachers of different width and normalisation."""
    folder = tmp_path_factory.mktemp("school")
    train(folder, {**TINY, "max_steps": 3}, "first")
    train(folder, {**TINY, "width": 6, "epochs": 1, "normalize": "dataset", "seed": 3}, "second")
    return folder


@pytest.fixture
def runs_with_teachers(runs: Path, school: Path) -> Path:
    shutil.copytree(school, runs, dirs_exist_ok=True)
    return runs


def plain_loss(logits: Tensor, labels: Tensor, taught: list[Tensor], weight: float, temperature: float) -> Tensor:
    """As the paper writes it, in other functions than ours."""
    target = torch.stack([torch.softmax(each / temperature, 1) for each in taught]).mean(0)
    student = torch.softmax(logits / temperature, 1)
    divergence = (target * (target.log() - student.log())).sum(1).mean()
    return (1 - weight) * F.cross_entropy(logits, labels) + weight * temperature**2 * divergence


@pytest.mark.parametrize("names", [pytest.param(["first"], marks=pytest.mark.slow), ["first", "second"]])
def test_it_is_a_plain_loop_of_distillation(runs_with_teachers: Path, names: list[str]) -> None:
    record = train(runs_with_teachers, {**STUDENT, "teacher": names}, "student")
    config = resolve_config(record.read_json("config"))
    assert config.teacher == ",".join(names)
    trainer = Trainer(config, None, teachers=())  # for its first weights and its batches
    trainer.begin_epoch()
    model, loader = trainer.model, trainer.train_loader
    teachers = [load_model(RunDir(runs_with_teachers / name)).eval() for name in names]
    kinds = {"first": "half", "second": "dataset"}
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses = []
    for step in range(4):
        images, labels = loader.make_batch(step)
        pixels = (images + 1) / 2  # of the student's `half`
        moments = {
            "half": (0.5, 0.5),
            "dataset": (torch.tensor(data.augment.MEAN).view(3, 1, 1), torch.tensor(data.augment.STD).view(3, 1, 1)),
        }
        with torch.no_grad():
            taught = [
                teacher((pixels - moments[kinds[name]][0]) / moments[kinds[name]][1])
                for name, teacher in zip(names, teachers, strict=True)
            ]
        loss = plain_loss(model(images), labels, taught, 0.7, 3.0)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                momentum[name].mul_(0.9).add_(parameter.grad)
                parameter.sub_(0.05 * momentum[name])
        losses.append(loss.item())
    row = list(record.read_rows())[-1]
    assert row["train/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    weights = torch.load(record.path / "weights.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_student_alone() -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10)) for _ in range(2))
    images, labels = torch.randn(8, 3, 4, 4), torch.randint(10, (8,))
    options = ForwardOptions(distillation=Distillation((teacher,), torch.tensor(1.0), torch.tensor(2.0)))
    loss, _, _ = forward(student, images, labels, labels, options)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    same, _, _ = forward(teacher, images, labels, labels, options)
    assert float(same.detach()) == pytest.approx(0.0, abs=1e-6), "who is the teacher has nothing to learn"


@pytest.mark.parametrize("smoothing", [None, torch.tensor(0.1)])
def test_the_losses_of_single_images_have_the_mean_of_all(smoothing: Tensor | None) -> None:
    torch.manual_seed(1)
    student, *teachers = (nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 10)) for _ in range(3))
    images, labels = torch.randn(8, 3, 4, 4), torch.randint(10, (8,))
    distillation = Distillation(tuple(teachers), torch.tensor(0.3), torch.tensor(5.0))
    whole, single = (
        forward(student, images, labels, labels, ForwardOptions(smoothing, per_sample=each, distillation=distillation))
        for each in (False, True)
    )
    assert single[2] is not None and single[2].shape == (8,)
    torch.testing.assert_close(whole[0], single[0])
    torch.testing.assert_close(single[2].mean(), whole[0].detach())


@pytest.mark.slow
def test_a_weight_of_zero_is_a_run_without_a_teacher(runs_with_teachers: Path) -> None:
    taught = train(runs_with_teachers, {**STUDENT, "teacher": "first", "distill_weight": 0.0}, "taught")
    alone = train(runs_with_teachers, STUDENT, "alone")
    assert hash_weights(taught) == hash_weights(alone), "the teacher draws no random number"


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"keep": 0.5}, {"cutmix": 1.0, "ema": 0.9}], ids=["keep", "cutmix"])
def test_an_interrupted_student_goes_on_bit_for_bit(runs_with_teachers: Path, keys: dict[str, Any]) -> None:
    values = {**STUDENT, "teacher": "first,second", "epochs": 2, "max_steps": 3, **keys}
    whole = train(runs_with_teachers, values, "whole")
    config = resolve_config(values)
    record = run.create_run(config, runs_with_teachers)
    while record.state != "finished" or not record.read_json("status"):
        left = iter(range(3))
        run.train_run(config, record, hooks=RunHooks(poll_stop=lambda left=left: None if next(left) < 1 else "interrupted"))
    assert hash_run(record) == hash_run(whole)


@pytest.mark.slow
def test_students_in_a_pack_and_one_after_the_other_are_what_each_is_alone(runs_with_teachers: Path) -> None:
    values = [{**STUDENT, "teacher": "first", "seed": seed, "distill_weight": weight} for seed, weight in ((0, 0.2), (1, 0.9))]
    alone = [hash_run(train(runs_with_teachers, each, f"alone{n}")) for n, each in enumerate(values)]
    configs = [resolve_config(each) for each in values]
    loops = [RunLoop(config, run.create_run(config, runs_with_teachers)) for config in configs]
    run.train_runs(loops)
    assert [hash_run(loop.run_dir) for loop in loops] == alone


def test_the_record_says_who_taught_and_what_it_cost(runs_with_teachers: Path) -> None:
    record = train(runs_with_teachers, {**STUDENT, "teacher": "first,second"}, "student")
    about, summary = record.read_json("run"), record.read_json("summary")
    teachers = [RunDir(runs_with_teachers / name) for name in ("first", "second")]
    assert "distilled" in about["tags"] and [each["run"] for each in about["teachers"]] == ["first", "second"]
    macs = [each.read_json("summary")["macs"] for each in teachers]
    num_images = 4 * 64
    assert summary["teacher_flops"] == 2 * sum(macs) * num_images
    assert summary["teacher_train_flops"] == sum(each.read_json("summary")["train_flops"] for each in teachers)
    assert summary["train_flops"] == 6 * summary["macs"] * num_images, "the teachers' part is apart"
    load_model(record)  # needs no teacher
    shutil.rmtree(runs_with_teachers / "first")
    load_model(record)


# -- who may teach -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "why"),
    [
        ({}, {}, ""),
        ({"val_size": 5000}, {"val_size": 5000}, ""),
        ({"val_size": 5000}, {"val_size": 10_000}, ""),  # the smaller cut lies in the larger one
        ({"val_size": 5000}, {"val_size": 4999}, "keeps for validation"),
        ({"val_size": 5000}, {"val_size": 0}, "keeps for validation"),
        ({"val_size": 0}, {"val_size": 0}, ""),
        ({"val_size": 0}, {"val_size": 5000}, ""),
        ({"val_size": 0, "train_size": 1000}, {"val_size": 0}, ""),  # nothing is chosen by validation images
        ({"train_size": 1000}, {"train_size": 1000}, ""),
        ({"train_size": 1000}, {"train_size": 500}, ""),
        ({"train_size": 1000}, {"train_size": 1001}, "does not train on"),
        ({"train_size": 1000}, {}, "does not train on"),
        ({"train_size": 1000, "val_size": 5000}, {"train_size": 1000, "val_size": 6000}, "does not train on"),
        ({}, {"train_size": 1000}, ""),
        ({}, {"dataset": "stand-in"}, "on stand-in"),
        ({"val_size": 0}, {"dataset": "stand-in"}, "on stand-in"),
    ],
)
def test_a_teacher_has_seen_no_image_that_its_student_may_not_learn_from(
    student: dict[str, Any], teacher: dict[str, Any], why: str
) -> None:
    found = describe_leak(*(resolve_config({"dataset": "cifar10", **each}) for each in (student, teacher)))
    assert why in found and bool(found) == bool(why)


@pytest.mark.parametrize(("small", "large"), [(15, 19), (4999, 5000)])
def test_cuts_of_different_sizes_lie_in_each_other(small: int, large: int) -> None:
    import numpy as np

    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    (_, inner), (_, outer) = (data.split_indices(labels, size) for size in (small, large))
    assert set(inner) <= set(outer)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"teacher": "nobody"}, "teacher: no run 'nobody'"),
        ({"teacher": "first", "val_size": 300}, "val_size 200, here 300"),
        ({"teacher": "first", "train_size": 256}, "train_size 512, here 256"),
        ({"teacher": "open"}, "has no weights, it is running"),
    ],
)
def test_who_cannot_teach_is_refused_before_anything_is_made(
    runs_with_teachers: Path, values: dict[str, Any], why: str
) -> None:
    run.create_run(resolve_config(TINY), runs_with_teachers, run.RunMetadata(run_id="open"))
    before = sorted(path.name for path in runs_with_teachers.iterdir())
    with pytest.raises(PartError, match=why):
        run.create_run(resolve_config({**STUDENT, **values}), runs_with_teachers)
    assert sorted(path.name for path in runs_with_teachers.iterdir()) == before


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"teacher": "a,b,a"}, "a name stands there twice"),
        ({"teacher": 12345678}, "has to be quoted"),
        ({"teacher": 1e5}, "has to be quoted"),
        ({"teacher": ["a", None]}, "valid string"),
        ({"teacher": "a", "distill_weight": 1.5}, "distill_weight"),
        ({"teacher": "a", "distill_temperature": 0.0}, "distill_temperature"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(values: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        resolve_config(values)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("", ""), (None, ""), (" , ", ""), ([], ""), ("a, b,", "a,b"), (["a ", "b"], "a,b"), ("x y/z", "x y/z")],
)
def test_names_of_teachers_are_kept_in_one_form_and_an_empty_value_is_none(given: Any, wanted: str) -> None:
    assert resolve_config({"teacher": "first"}, {"teacher": given}).teacher == wanted


def test_an_empty_value_on_the_command_line_is_no_teacher() -> None:
    assert resolve_config({"teacher": "first"}, parse_pairs(["teacher="])).teacher == ""


# -- who was refused, and is trained after all -------------------------------------------------------------------------


def refuse(config: Settings, runs: Path, run_id: str) -> RunDir:
    """The record of a trial that was refused, as `sweeps retry` leaves it."""
    metadata = run.RunMetadata(run_id=run_id, tags=["mine"])
    with pytest.raises(PartError, match="teacher: ") as error:
        run.create_run(config, runs, metadata)
    record = run.record_refused_run(config, runs, metadata, str(error.value))
    assert record.state == "failed" and "teachers" not in record.read_json("run")
    record.set_status("interrupted", reason="to be tried again")
    return record


def test_a_refused_run_that_is_tried_again_has_its_teacher(runs_with_teachers: Path) -> None:
    config = resolve_config({**STUDENT, "teacher": "first,second", "max_steps": 1})
    weights, away = runs_with_teachers / "first" / "weights.pt", runs_with_teachers.parent / "weights.pt"
    weights.rename(away)
    record = refuse(config, runs_with_teachers, "student")
    before = record.read_json("run")
    uncounted = {**before["cost"], "macs": 0, "params": 0, "verified": False}  # as where the network could not be built
    record.write_json("run", {**before, "cost": uncounted, "tags": ["mine", "macs unverified", "distilled"]})
    with pytest.raises(PartError, match="first has no weights"):
        run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    away.rename(weights)
    again = run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    about = again.read_json("run")
    assert [each["run"] for each in about["teachers"]] == ["first", "second"]
    assert about["cost"] == before["cost"] and about["tags"] == ["mine", "distilled"]
    assert about["created"] == before["created"] and not again.is_owned
    assert run.train_run(config, again) == "finished"
    macs = [RunDir(runs_with_teachers / name).read_json("summary")["macs"] for name in ("first", "second")]
    assert again.read_json("summary")["teacher_flops"] == 2 * sum(macs) * 64


def test_a_teacher_that_may_not_teach_is_refused_each_time(runs_with_teachers: Path) -> None:
    config = resolve_config({**STUDENT, "teacher": "first", "val_size": 300})
    record = refuse(config, runs_with_teachers, "student")
    for _ in range(2):
        with pytest.raises(PartError, match="val_size 200, here 300"):
            run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    with pytest.raises(PartError, match="names no teacher; train it anew"):
        run.train_run(config, record)
    assert record.state == "interrupted"


def test_a_run_that_began_without_its_teacher_does_not_go_on(runs_with_teachers: Path) -> None:
    config = resolve_config({**STUDENT, "teacher": "first"})
    record = run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    about = record.read_json("run")
    del about["teachers"]
    record.write_json("run", about)
    record.set_status("interrupted")
    record.append_row({"epoch": 1})
    run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    with pytest.raises(PartError, match="names no teacher"):
        run.train_run(config, record)
    assert "teachers" not in record.read_json("run") and record.state == "interrupted"


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"run": "second"}, None])
def test_a_pack_has_the_same_teachers_or_is_none(runs_with_teachers: Path, change: dict[str, str] | None) -> None:
    config = resolve_config({**STUDENT, "teacher": "first"})
    loops = [RunLoop(config, run.create_run(config, runs_with_teachers)) for _ in range(2)]
    about = loops[1].run_dir.read_json("run")
    about["teachers"] = [{**about["teachers"][0], **change}] if change else []
    loops[1].run_dir.write_json("run", about)
    for loop in loops:
        loop.run_dir.set_status("interrupted")
    with pytest.raises(PartError, match="have different teachers; train each alone" if change else "names no teacher"):
        run.train_runs(loops)
    assert [loop.run_dir.state for loop in loops] == ["interrupted"] * 2


@pytest.mark.slow
def test_a_teacher_that_is_lost_or_changed_ends_no_record(runs_with_teachers: Path) -> None:
    values = {**STUDENT, "teacher": "first", "epochs": 2, "max_steps": 2}
    config = resolve_config(values)
    record = run.create_run(config, runs_with_teachers)
    steps = iter(range(9))
    run.train_run(config, record, hooks=RunHooks(poll_stop=lambda: None if next(steps) < 2 else "interrupted"))
    teacher, away = runs_with_teachers / "first", runs_with_teachers.parent / "away"
    teacher.rename(away)
    with pytest.raises(UserError, match="is gone"):
        run.train_run(config, record)
    teacher.mkdir()
    for file in away.iterdir():
        if file.is_file():
            shutil.copy(file, teacher)
    content = (teacher / "weights.pt").read_bytes()
    (teacher / "weights.pt").write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="have changed since"):
        run.train_run(config, record)
    assert record.state == "interrupted"
    (teacher / "weights.pt").write_bytes(content)
    assert run.train_run(config, record) == "finished"


@pytest.mark.slow
def test_a_folder_of_runs_that_was_moved_still_has_its_teachers(runs_with_teachers: Path) -> None:
    values = {**STUDENT, "teacher": "first"}
    config = resolve_config(values)
    run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    moved = runs_with_teachers.parent / "moved"
    runs_with_teachers.rename(moved)
    assert run.train_run(config, RunDir(moved / "student")) == "finished"


@pytest.mark.parametrize("damage", [7, [7], [{"run": "a"}], [{"run": "../a", "path": "/", "sha256": "", "macs": 1.0}]])
def test_damaged_teachers_of_a_record_are_said(runs_with_teachers: Path, damage: Any) -> None:
    config = resolve_config({**STUDENT, "teacher": "first"})
    record = run.create_run(config, runs_with_teachers, run.RunMetadata(run_id="student"))
    file = record.path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "teachers": damage}))
    with pytest.raises(UserError, match="damaged"):
        run.train_run(config, record)


@pytest.mark.parametrize(("given", "wanted"), [("half", "dataset"), ("dataset", "half")])
def test_a_teacher_gets_its_own_normalisation(given: str, wanted: str) -> None:
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    network = Renormalised(nn.Identity(), given, wanted)
    found = network(data.normalize(pixels, given))
    torch.testing.assert_close(found, data.normalize(pixels, wanted), rtol=1e-5, atol=1e-5)
    half = network(data.normalize(pixels, given, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
