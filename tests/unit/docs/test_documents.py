"""The documents without running their commands: size, links, YAML, what has to be listed in them, the generated reference."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar import registry
from cifar.states import TRIAL_STATES
from cifar.sweeps import spec
from cifar.sweeps.distributions import DISTRIBUTION_OPTIONS
from helpers.documents import documents, find_anchors, name_of, read_blocks, read_links
from helpers.paths import PACKAGE, ROOT

LANGUAGES = {"sh", "python", "yaml"}
# Variables that only tests read, or that are written in one place and read in the same one.
UNLISTED_VARIABLES = {
    "CIFAR_",
    "CIFAR_TIMELINE_BEGUN",
    "CUDA_MODULE_LOADING",
    "PYTHONPATH",
    "WANDB_SERVICE",
    "WANDB_SILENT",
    "WANDB_ERROR_REPORTING",
}


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def test_readme_is_short() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1000


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for file, anchor in read_links(path):
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name_of(path)} links to {file}"
        if anchor:
            assert anchor in find_anchors(target), f"{name_of(path)} links to {file}#{anchor}"


@pytest.mark.parametrize("path", documents(), ids=name_of)
def test_blocks_have_a_known_language(path: Path) -> None:
    """So that no block escapes the tests."""
    for block in read_blocks(path):
        assert block.language in LANGUAGES or block.language.startswith("{"), f"{block.file}:{block.line}: {block.language}"


def test_every_page_is_in_the_contents() -> None:
    listed = re.findall(r"^([\w/]+)$", read("docs/index.md"), flags=re.M)
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in documents() if (ROOT / "docs") in path.parents}
    assert pages - {"index"} == set(listed)


def test_no_document_names_a_folder_of_this_machine() -> None:
    for path in documents():
        assert not re.search(r"(?<![\w.-])/(tmp|work|root|home)/", path.read_text("utf-8")), name_of(path)


def test_every_environment_variable_is_listed() -> None:
    """Those that the package reads or sets by name, and all that begin with CIFAR_, wherever they are."""
    sources = [*PACKAGE.rglob("*.py")]
    found = {
        name
        for path in sources
        for name in re.findall(r"\b(CIFAR_[A-Z_]*|WANDB_(?:MODE|DIR|BASE_URL))\b", path.read_text("utf-8"))
    }
    for path in sources:
        for line in path.read_text("utf-8").splitlines():
            if "environ" in line:
                found |= set(re.findall(r"\"([A-Z][A-Z_]+_[A-Z_]+|NETRC)\"", line))
    for path in [*(ROOT / "benchmarks").rglob("*.py"), ROOT / "docs" / "slurm.sh", ROOT / "docs" / "kubernetes.yaml"]:
        found |= set(re.findall(r"\b(CIFAR_[A-Z_]+)\b", path.read_text("utf-8")))
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", read("docs/clusters.md")))
    assert found - UNLISTED_VARIABLES - {"CIFAR_URL"} <= listed


def test_sweep_page_names_every_key_and_state() -> None:
    text = read("docs/sweeps.md")
    for word in (*spec._TOP_LEVEL_KEYS, *DISTRIBUTION_OPTIONS, *TRIAL_STATES):
        assert f"`{word}`" in text, f"docs/sweeps.md does not name `{word}`"


def test_report_page_names_every_figure() -> None:
    for entry in registry.figures:
        assert f"`{entry.name}`" in read("docs/reports.md"), entry.name


def test_wandb_page_names_every_metric() -> None:
    from cifar.training.run import METRIC_LABELS

    text = read("docs/wandb.md")
    for metric in METRIC_LABELS:
        assert f"`{metric}`" in text, metric
    for probe in registry.probes:
        for metric in probe.builder.labels:
            assert (f"`{metric}`" if metric.startswith("train/") else f"`{metric}/LAYER`") in text, metric


def test_architecture_names_what_there_is() -> None:
    """Rows of `file` | `name`: the file is there, and defines the name. Other code spans that are paths lead to files."""
    text = read("docs/architecture.md")
    rows = re.findall(r"^\|(?: [^|`]+ \|)? `([\w/]+\.py)` \| ([^|]*)\|", text, flags=re.M)
    assert len(rows) > 30
    for file, names in rows:
        source = (PACKAGE / file).read_text("utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^\s*(def|class) {part}\b|^\s*{part}\b\s*[:=]", source, flags=re.M), f"{file} has no {name}"
    for path in re.findall(r"`((?:[\w]+/)+(?:\w+\.\w+)?)`", text):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path


CHECK = """
import json, os, runpy, sys
from pathlib import Path

reference = runpy.run_path(sys.argv[1])["main"](["--check"])  # prints what is not current, without plug-ins

from cifar.config.resolve import resolve_config
from cifar.config.yaml_loader import parse_yaml
from cifar.sweeps import spec

os.environ["CIFAR_PLUGINS"] = "my_plugins"
for where, text in json.load(sys.stdin):
    content = parse_yaml(text, where)
    if "method" in content:
        sweep = spec.parse_sweep(content, text, where, "a sweep")
        fixed = {"test": "final"} if text.startswith("# sweep FILE --set test=final") else {}
        spec.check_sweep(sweep, fixed, count=sweep.run_cap or 20)
    else:
        Path("experiment.yaml").write_text(text)
        resolve_config({"experiment": "experiment.yaml"})
print("all YAML is right")
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The reference and all YAML, checked in a process of its own, which no other test has given parts."""
    place = tmp_path_factory.mktemp("checked")
    blocks = [(f"{b.file}:{b.line}", b.text) for path in documents() for b in read_blocks(path) if b.language == "yaml"]
    assert len(blocks) >= 7
    write_plugins(place)
    command = [sys.executable, "-c", CHECK, str(ROOT / "docs" / "generate_reference.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, input=json.dumps(blocks), env=environment, cwd=place, capture_output=True, text=True, check=False
    )


def test_generated_reference_is_current(checked: subprocess.CompletedProcess[str]) -> None:
    assert "not current" not in checked.stdout, f"run: python docs/generate_reference.py\n{checked.stdout}"
    assert checked.stdout, checked.stderr


def test_yaml_is_what_it_says(checked: subprocess.CompletedProcess[str]) -> None:
    """Every sweep is parsed, and each of its values bound, by the real parser; the others are experiments."""
    assert checked.stdout.endswith("all YAML is right\n"), checked.stderr


def write_plugins(folder: Path) -> list[str]:
    """The examples of extending.md, each in the file that its first line names."""
    names = []
    for block in read_blocks(ROOT / "docs" / "extending.md"):
        named = re.match(r"# (my_plugins/\S+\.py)\n", block.text)
        if block.language == "python":
            assert named, f"{block.file}:{block.line}: the first line of an example names its file"
            file = folder / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
            names.append(named[1])
    return names


def test_there_is_an_example_of_each_part(tmp_path: Path) -> None:
    folders = {name.split("/")[1] for name in write_plugins(tmp_path)}
    assert folders == {"models", "optim", "schedules", "probes", "figures"}


@pytest.mark.slow
def test_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """What `make docs` does."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "reference" / "api.html").exists()
