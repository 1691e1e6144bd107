"""Secrets planted where people have them: none is found in what is written, sent to W&B or printed."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

from helpers.paths import ROOT
from helpers.protocol import Server

PLUGIN = '''
import base64, json, logging, netrc, os, sys, warnings
from torch import nn
from cifar.registry import models

NAMES = ("DB_PASSWORD", "SERVICE_TOKEN", "DATABASE_URL", "PRIVATE_KEY", "SLACK_WEBHOOK_URL", "WANDB_API_KEY")

def list_all():
    """Everything secret, as libraries put it into their messages."""
    values = [os.environ[name] for name in NAMES]
    values.append(netrc.netrc(os.environ["HOME"] + "/.netrc").authenticators("example.org")[2])
    plain = " ".join(values)
    basic = base64.b64encode(("me:" + os.environ["DB_PASSWORD"]).encode()).decode()
    dsn = "https://me:" + os.environ["DB_PASSWORD"] + "@example.org/x?token=" + os.environ["SERVICE_TOKEN"]
    return f"{plain} {values!r} {json.dumps(values)} Authorization: Basic {basic} {dsn} {os.environ!r}"

def say_all():
    print(list_all())
    print(os.environ["DB_PASSWORD"][:9], end="", flush=True)
    print(os.environ["DB_PASSWORD"][9:])
    sys.stderr.write(list_all())
    sys.stderr.flush()
    warnings.warn(list_all())
    logging.getLogger("plant").warning(list_all())

say_all()

@models.register("plant")
def plant(*, fail_at: int = 0, note: str = "") -> nn.Module:
    class Plant(nn.Sequential):
        num_passes = 0
        def forward(self, x):
            if self.training:
                self.num_passes += 1
                local = list_all()
                say_all()
                if os.environ.get("PLANT_RAW"):
                    os.write(1, (local + "\\n").encode())
                    os.write(2, local[:700].encode())
                    os.write(2, local[700:].encode() + b"\\n")
                    os.system('echo "$DB_PASSWORD"')
                if self.num_passes == fail_at:
                    try:
                        raise ConnectionError(local)
                    except ConnectionError as error:
                        raise RuntimeError("401: " + local, {"key": os.environ["WANDB_API_KEY"]}) from error
            return super().forward(x)
    return Plant(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(256, 10))
'''
# A run has 12 training passes. Fewer than ten are tried before it, so that `fail_at: 10` fails in the training.
SWEEP = """name: planted
method: grid
metric: {name: val/acc, goal: maximize}
parameters:
  model: {value: plant}
  fail_at: {values: [0, 10]}
  epochs: {value: 3}
  train_size: {value: 256}
  val_size: {value: 500}
  batch_size: {value: 64}
  dataset: {value: stand-in}
"""
TINY = ["model=plant", "epochs=3", "train_size=256", "val_size=500", "batch_size=64", "dataset=stand-in"]


@dataclass
class Plant:
    """The secrets, and the commands that meet them."""

    folder: Path
    server: Server
    printed: dict[str, str] = field(default_factory=dict)  # command -> output
    hidden: dict[str, str] = field(default_factory=dict)  # name -> secret
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def make() -> str:
            return secrets.token_urlsafe(18)

        home, repo = self.folder / "home", self.folder / "repo"
        for place in (home, repo, self.folder / "plug-ins" / "models", self.folder / "broken" / "models", self.folder / "tmp"):
            place.mkdir(parents=True, exist_ok=True)
        (self.folder / "plug-ins" / "models" / "plant.py").write_text(PLUGIN)
        broken = "import os\nraise RuntimeError('no connection to ' + os.environ['DATABASE_URL'] + os.environ['DB_PASSWORD'])\n"
        (self.folder / "broken" / "models" / "broken.py").write_text(broken)
        lines = [secrets.token_urlsafe(40) for _ in range(3)]
        in_url, storage, remote = f"{make()}/+", make(), f"ghp_{secrets.token_hex(18)}"
        self.hidden = {
            "variable": make(),
            "variable that every escape changes": f"{make()}\"'\\&<é",
            "URL in a variable": in_url,
            **{f"private key, line {n}": line for n, line in enumerate(lines)},
            "webhook": make(),
            "netrc": make(),
            "W&B key": self.server.key,
            "storage": storage,
            "git remote": remote,
            "notes": make(),
            "tags": make(),
        }
        netrc = f"machine example.org\n  login me\n  password {self.hidden['netrc']}\n"
        (home / ".netrc").write_text(netrc)
        subprocess.run(["git", "init", "-q", str(repo)], check=True)
        subprocess.run(["git", "-C", str(repo), "remote", "add", "origin", f"https://{remote}@github.com/me/x"], check=True)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
            **self.server.environment(),
            "HOME": str(home),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CIFAR_PLUGINS": str(self.folder / "plug-ins"),
            "DB_PASSWORD": self.hidden["variable"],
            "SERVICE_TOKEN": self.hidden["variable that every escape changes"],
            "DATABASE_URL": f"postgresql://me:{quote(in_url, safe='')}@db.example.org/x?sslmode=require",
            "PRIVATE_KEY": "\n".join(["-----BEGIN PRIVATE KEY-----", *lines, "-----END PRIVATE KEY-----"]),
            "SLACK_WEBHOOK_URL": f"https://hooks.example.org/services/{self.hidden['webhook']}",
            "WANDB_NOTES": self.hidden["notes"],
            "WANDB_NOTES_TOKEN": self.hidden["notes"],
            "WANDB_TAGS": self.hidden["tags"],
            "TAGS_SECRET": self.hidden["tags"],
        }

    def run(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run a command -> what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "cifar", *arguments],
            env={**self.environment, **environment},
            cwd=self.folder / "repo",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        name = f"{len(self.printed)} {' '.join(arguments)[:60]}"
        self.printed[name] = done.stdout
        assert done.returncode == code, f"{name}: {done.returncode}\n{done.stdout[-3000:]}"
        return done.stdout

    def write(self, text: str) -> str:
        """A sweep file, which is deleted before the search."""
        file = self.folder / "repo" / f"sweep-{len(list((self.folder / 'repo').iterdir()))}.yaml"
        file.write_text(text)
        return str(file)

    def read_all(self) -> dict[str, bytes]:
        """All that was printed, written and sent, by where it is. What the secrets were planted in is deleted before."""
        for file in (self.folder / "repo").glob("*.yaml"):
            file.unlink()
        (self.folder / "home" / ".netrc").unlink()
        (self.folder / "repo" / ".git" / "config").unlink()
        texts = {f"printed by {name}": text.encode() for name, text in self.printed.items()}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            texts[str(path.relative_to(self.folder))] = path.read_bytes()
        for n, request in enumerate(self.server.requests):
            body = request.body if isinstance(request.body, bytes) else json.dumps(request.body, ensure_ascii=False).encode()
            texts[f"request {n} {request.name}"] = request.path.encode() + b"\n" + body
        for run in self.server.runs.values():
            texts |= {f"file {name} of {run.id} on the server": bytes(content) for name, content in run.files.items()}
        return texts

    def find_leaks(self, texts: dict[str, bytes]) -> list[str]:
        """Where a secret is found, in any of the forms that a reader could take it from."""
        return [
            f"{what}, as {form[:6].decode(errors='replace')}..., in {where}"
            for what, secret in self.hidden.items()
            for form in list_forms(secret)
            for where, text in texts.items()
            if form in text
        ]


def list_forms(secret: str) -> set[bytes]:
    """The secret as it stands in text, and as others write it. Of base64, the part that is sure to be the secret's."""
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret), quote(secret, safe="")}
    whole = [base64.b64encode(b"x" * n + secret.encode())[4:-4] for n in range(3)]
    return {form.encode() for form in forms} | {form for form in whole if len(form) > 12}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_planted_secrets_are_found_nowhere(wandb_server: Server, tmp_path: Path) -> None:
    plant = Plant(tmp_path, wandb_server)
    hidden = plant.hidden["variable"]
    # a hosted sweep, a local one, and single runs: the plug-in speaks at import, in the forward pass, and fails
    plant.run("sweep", plant.write(SWEEP), "--no-agent")
    said = plant.run("agent", wandb_server.only_sweep().id, "--workers", "1", PLANT_RAW="1")
    assert "1 finished, 1 failed" in said and "401: ***" in said
    assert len(wandb_server.runs) == 2, said
    plant.run("sweep", plant.write(SWEEP), "--no-agent", "--wandb", "disabled")
    local = next(path.name for path in (tmp_path / "runs" / "sweeps").iterdir() if (path / "study.db").exists())
    plant.run("agent", local, "--workers", "2", PLANT_RAW="1")
    for arguments in (["sweeps", "status", local], ["sweeps", "status", local, "--json"], ["sweeps", "list"]):
        assert "failed" in plant.run(*arguments)
    plant.run("report", local, "--json")
    plant.run("report", *[path.parent.name for path in (tmp_path / "runs").glob("*/run.json")])
    plant.run("push", local)
    plant.run("train", *TINY, "fail_at=10", code=1)
    plant.run("train", *TINY, "fail_at=10", "--wandb", "offline", code=1)
    plant.run("train", *TINY, "fail_at=0", "--name", "fine", "--tags", "a,b")
    plant.run("profile", "plant")
    plant.run("doctor", "--json")
    # refused: it fails where it is tried before a run
    said = plant.run("train", *TINY, "fail_at=1", code=2)
    assert "RuntimeError" in said and "***" in said and "Traceback" not in said, said
    # refused: it would be written down
    runs_before = sorted((tmp_path / "runs").iterdir())
    for arguments in (
        ["train", *TINY, f"note=x{hidden}"],
        ["train", *TINY, "--name", hidden],
        ["train", *TINY, "--tags", f"fine,{plant.hidden['netrc']}"],
        ["train", *TINY, "--tags", f"fine,{plant.hidden['netrc']}", "--dry-run"],
        ["train", *TINY, "note=https://me:secret@example.org"],
        ["sweep", plant.write(SWEEP + f"  note: {{values: [a, {hidden}]}}\n")],
        ["sweep", plant.write(f"description: the key is {wandb_server.key}\n" + SWEEP)],
        ["sweep", plant.write(SWEEP + f"# {hidden}\n"), "--wandb", "disabled"],
        ["sweep", plant.write(SWEEP), "--set", f"note={hidden}"],
        ["sweep", plant.write(SWEEP), "--storage", f"postgresql://me:{hidden}@127.0.0.1:1/db"],
        ["config", f"note={hidden}"],
    ):
        said = plant.run(*arguments, code=2)
        assert said.count("error:") == 1 and "Traceback" not in said, said
    storage = f"postgresql://me:{plant.hidden['storage']}@127.0.0.1:1/db"
    said = plant.run("sweep", plant.write(SWEEP), "--no-agent", code=2, CIFAR_STORAGE=storage)
    assert "postgresql" in said and "me:***@127.0.0.1" in said, said
    said = plant.run("models", "--no-time", code=2, CIFAR_PLUGINS=str(tmp_path / "broken"))
    assert "RuntimeError" in said and "***" in said
    assert sorted((tmp_path / "runs").iterdir()) == runs_before
    assert sum("***" in text for text in plant.printed.values()) > 10  # the plug-in has spoken
    texts = plant.read_all()
    seen = " ".join(where for where, text in texts.items() if b"401: ***" in text)
    for place in ("printed by", "traceback.txt", ".log", "study.db", "status.json", "request", ".wandb"):
        assert place in seen, f"{place}: the message with the secrets has not come here, so this shows nothing"
    assert not (leaks := plant.find_leaks(texts)), "\n".join(leaks[:40])
