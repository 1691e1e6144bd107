"""Transfers from a real server on the loopback that breaks off, lies, hangs or is slow."""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import requests  # noqa: F401  # before it is measured how fast a server is

from cifar.data import cifar10
from cifar.data.download import BLOCK_BYTES, download_file, measure_rate
from cifar.errors import UserError
from helpers.loopback import SMALL, Server, md5

BUSY = 3.0  # seconds that a loaded machine may add to a limit


@pytest.fixture(autouse=True)
def away_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CIFAR_DATA", "CIFAR_MIRRORS", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def closed_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe_socket.getsockname()[1]}/x"


def get(urls: list[str], path: Path, content: bytes = SMALL, **more: object) -> bytes:
    download_file(urls, path, md5=md5(content), size=len(content), **more)
    return path.read_bytes()


# -- downloading -------------------------------------------------------------------------------------------------------


def test_downloads_and_reports_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert get([server.url], tmp_path / "new" / "a", progress=lambda done, total: seen.append((done, total))) == SMALL
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1] == (len(SMALL), len(SMALL))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) in (["a"], [".a.lock", "a"])
    get([server.url], tmp_path / "new" / "a")
    assert len(server.requests) == 1, "what is there is not fetched again"


def test_goes_on_where_the_connection_broke(server: Server, tmp_path: Path) -> None:
    server.drop_after = len(SMALL) // 3 + 1
    assert get([server.url], tmp_path / "a") == SMALL
    starts = [int(asked[6:-1] or 0) if asked else 0 for asked in server.requests]
    assert len(starts) <= 4 and starts[0] == 0
    assert all(0 <= before + server.drop_after - after <= BLOCK_BYTES for before, after in pairwise(starts)), (
        "next to nothing twice"
    )


def test_goes_on_after_a_killed_process(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(SMALL[:1000])
    assert get([server.url], tmp_path / "a") == SMALL and server.requests == ["bytes=1000-"]


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(SMALL), b"x" * (len(SMALL) + 5)], ids=["short", "full", "long"])
def test_a_part_of_another_file_is_thrown_away(server: Server, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "a.part").write_bytes(left)
    assert get([server.url], tmp_path / "a") == SMALL


def test_a_server_without_range(server: Server, tmp_path: Path) -> None:
    server.knows_range = False
    (tmp_path / "a.part").write_bytes(SMALL[:1000])
    assert get([server.url], tmp_path / "a") == SMALL


def test_mirrors_are_asked_in_turn(server: Server, tmp_path: Path) -> None:
    with Server() as gone, Server(SMALL[:-1] + b"?") as corrupt, Server(b"<html>log in</html>") as portal:
        gone.status = 404
        urls = [closed_url(), gone.url, portal.url, corrupt.url, server.url]
        assert get(urls, tmp_path / "a") == SMALL
        assert [len(s.requests) for s in (gone, portal, corrupt, server)] == [1, 1, 1, 1]


def test_all_fail_and_each_reason_is_told(server: Server, tmp_path: Path) -> None:
    server.content = SMALL[:-1] + b"?"
    with pytest.raises(UserError, match=r"(?s)refused.*not the official") as caught:
        get([closed_url(), server.url], tmp_path / "a")
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir() if "lock" not in p.name] == []


def test_endless_breaking_off_ends(server: Server, tmp_path: Path) -> None:
    server.drop_after, server.knows_range = 5000, False
    with pytest.raises(UserError, match="could not be downloaded"):
        get([server.url], tmp_path / "a")


def test_no_space_left(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        get([server.url], tmp_path / "a")


def test_a_folder_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written \((Not a directory|File exists)\)"):
        get([server.url], tmp_path / "file" / "a")


def fetch_in_process(folder: Path, url: str, go: str) -> None:
    while not Path(go).exists():
        time.sleep(0.005)
    cifar10.download_and_unpack(folder, [url], md5=md5(SMALL), size=len(SMALL))


def test_eight_processes_download_once(server: Server, tmp_path: Path) -> None:
    server.bytes_per_second = 1e6
    go = tmp_path / "go"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fetch_in_process, args=(tmp_path / "data", server.url, str(go))) for _ in range(8)]
    for worker in workers:
        worker.start()
    go.touch()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 8 and len(server.requests) == 1
    unpacked = tmp_path / "data" / cifar10.FOLDER
    assert sorted(p.name for p in unpacked.iterdir()) == sorted(cifar10.BATCHES)
    assert cifar10.read_batch((unpacked / "test_batch").read_bytes(), "x")[1].tolist() == [0, 1, 2]


def test_obtain_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "URL", closed_url())
    with pytest.raises(UserError) as caught:
        cifar10.find_or_download(tmp_path / "here", mirrors=[closed_url()])
    text = str(caught.value)
    assert all(part in text for part in (str(tmp_path / "here"), "CIFAR_DATA", "--dataset stand-in", cifar10.ARCHIVE))


def test_mirrors_come_after_the_official_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_MIRRORS", "http://b/x http://c/x")
    assert cifar10.list_urls(["http://a/x", "http://b/x"]) == [cifar10.URL, "http://a/x", "http://b/x", "http://c/x"]


# -- auto --------------------------------------------------------------------------------------------------------------


def hanging_url() -> tuple[socket.socket, str]:
    """A server that accepts and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}/x"


def test_auto_takes_what_is_there(tmp_path: Path) -> None:
    (tmp_path / cifar10.FOLDER).mkdir()
    choice, reason = cifar10.resolve_auto(tmp_path)
    assert choice == "cifar10" and str(tmp_path) in reason


def test_auto_gives_up_on_a_silent_server_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener, url = hanging_url()
    monkeypatch.setattr(cifar10, "URL", url)
    start = time.monotonic()
    choice, reason = cifar10.resolve_auto(tmp_path, timeout=2.0)
    assert choice == "stand-in" and "no answer from 127.0.0.1" in reason and time.monotonic() - start < 2.0 + BUSY
    listener.close()


def test_auto_gives_up_on_a_name_that_never_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*_: object, **__: object) -> None:
        over.wait(30)
        raise socket.gaierror("hung")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert cifar10.resolve_auto(tmp_path, timeout=2.0)[0] == "stand-in" and time.monotonic() - start < 2.0 + BUSY
    over.set()


def test_auto_is_over_at_once_where_nothing_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "URL", closed_url())
    start = time.monotonic()
    assert cifar10.resolve_auto(tmp_path)[0] == "stand-in" and time.monotonic() - start < 3 + BUSY


@pytest.mark.parametrize(("bytes_per_second", "choice"), [(0.0, "cifar10"), (5000.0, "stand-in")])
def test_auto_judges_the_speed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_per_second: float, choice: str
) -> None:
    server.content, server.bytes_per_second = bytes(16 << 20), bytes_per_second
    monkeypatch.setattr(cifar10, "URL", server.url)
    monkeypatch.setattr(cifar10, "ARCHIVE_SIZE", 16 << 20)
    got, reason = cifar10.resolve_auto(tmp_path, timeout=3.0)
    assert got == choice and "minutes" in reason


def test_auto_is_not_fooled_by_a_login_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(b"<html>log in</html>") as portal:
        monkeypatch.setattr(cifar10, "URL", portal.url)
        assert cifar10.resolve_auto(tmp_path, timeout=3.0)[0] == "stand-in"


def test_auto_sees_that_there_is_no_room(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cifar10, "URL", server.url)
    choice, reason = cifar10.resolve_auto(tmp_path / "file" / "data")
    assert choice == "stand-in" and "cannot be written" in reason and not server.requests


def test_the_quickest_address_counts(server: Server) -> None:
    listener, url = hanging_url()
    server.content = bytes(1 << 20)
    assert measure_rate([url, server.url], 1 << 20, 5.0, enough=1e4) > 1e5
    listener.close()
