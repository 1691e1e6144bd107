"""A real PostgreSQL server for tests: the URL in CIFAR_POSTGRES, or one started here from Debian's package.

python tests/helpers/postgres.py      # starts one on loopback, prints its URL, ends with its standard input (.ci/run does this)
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("initdb", "postgres", "pg_isready")
SECONDS = 30.0  # for the server to answer


def binaries() -> Path | None:
    """Where initdb and postgres are; the newest of several."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        folders.append(Path(found).resolve().parent)
    return next((folder for folder in folders if all((folder / name).exists() for name in NEEDED)), None)


@contextlib.contextmanager
def server(*, is_durable: bool = False) -> Iterator[str]:
    """A server in a folder of its own, on a free port of loopback -> its URL. It is gone afterwards.

    is_durable: a commit waits for the disk, as of every server that people keep data in.
    """
    where = binaries()
    assert where, "no PostgreSQL: apt-get install postgresql"
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="cifar-postgres-", dir="/tmp"))
    if user:
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {"PATH": os.environ["PATH"], "LANG": "C"}
    options = {"cwd": folder, "env": clean, "stdout": subprocess.DEVNULL, **user}
    subprocess.run([where / "initdb", "-D", folder / "data", "-U", "cifar", "-A", "trust", "-E", "UTF8"], check=True, **options)
    fsync = f"fsync={'on' if is_durable else 'off'}"
    settings = (fsync, "max_connections=200", f"unix_socket_directories={folder}", "listen_addresses=127.0.0.1")
    command = [where / "postgres", "-D", folder / "data", "-p", str(port), *(f"--{setting}" for setting in settings)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stderr=log, **options)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        ready = [where / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
        while subprocess.run(ready, check=False, **options).returncode:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"postgresql://cifar@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5.0)
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with server() as url:
        print(url, flush=True)
        sys.stdin.read()
