"""Downloads against a server of the test's own, which can break off, ignore ranges and change its mind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slabformer.models.weights import download as downloading
from slabformer.models.weights.download import download

CONTENT = bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    """Sends ``server.content``; of every answer only as many bytes as ``server.breaks`` says next."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked.append(self.headers.get("Range", "all"))
        start = self._start(server)
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.content) - start))
        if server.version:
            self.send_header("ETag", server.version)
        self.end_headers()
        limit = server.breaks.pop(0) if server.breaks else None
        self.wfile.write(server.content[start:][:limit])
        return None

    def _start(self, server: Server) -> int:
        same = self.headers.get("If-Range") == server.version
        ranged = server.ranges and same and "Range" in self.headers
        return int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if ranged else 0

    def log_message(self, *args: object) -> None: ...


class Server(ThreadingHTTPServer):
    content, version, ranges = CONTENT, '"one"', True

    def __init__(self) -> None:
        super().__init__(("localhost", 0), Handler)
        self.breaks: list[int] = []
        self.asked: list[str] = []
        self.url = f"http://localhost:{self.server_port}/weights.pth"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.pth"


def left_behind(path: Path) -> set[str]:
    return {file.name for file in path.parent.iterdir()} - {path.name, f"{path.name}.lock"}


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(server: Server, path: Path) -> None:
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert left_behind(path) == set()


def test_a_connection_that_breaks_off_is_gone_on_with(server: Server, path: Path) -> None:
    server.breaks = [1000, 500]
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["all", "bytes=1000-", "bytes=1500-"]


def test_the_next_call_goes_on_where_the_last_one_stopped(server: Server, path: Path) -> None:
    server.breaks = [1000, 0]
    with pytest.raises(ConnectionError, match=r"cut short at 1,000 of 10,240 bytes\); 1,000 bytes of it are kept"):
        download(server.url, path)
    assert not path.exists()
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=1000-"


def test_a_server_that_ignores_ranges_starts_anew(server: Server, path: Path) -> None:
    server.ranges, server.breaks = False, [1000]
    download(server.url, path)
    assert path.read_bytes() == CONTENT


def test_two_versions_of_a_file_are_never_joined(server: Server, path: Path) -> None:
    server.breaks = [1000, 0]
    with pytest.raises(ConnectionError):
        download(server.url, path)
    server.content, server.version = CONTENT[::-1], '"two"'
    download(server.url, path)
    assert path.read_bytes() == CONTENT[::-1]


def test_a_version_without_a_mark_is_fetched_from_its_beginning(server: Server, path: Path) -> None:
    server.version, server.breaks = 'W/"weak"', [1000]
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == ["all", "all"]


def test_a_part_that_is_longer_than_the_file_starts_anew(server: Server, path: Path) -> None:
    path.parent.mkdir()
    path.with_name("weights.pth.part").write_bytes(bytes(len(CONTENT)))
    path.with_name("weights.pth.part.mark").write_text('"one"')
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-", "all"]


def test_a_server_that_always_breaks_off_is_given_up(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloading, "MOST_ATTEMPTS", 3)
    server.breaks = [100] * 10
    with pytest.raises(ConnectionError, match="cut short at 300 of 10,240"):
        download(server.url, path)
    assert len(server.asked) == 3


def test_processes_that_want_the_same_file_fetch_it_once(server: Server, path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(server.url, path), range(4)))
    assert path.read_bytes() == CONTENT
    assert server.asked == ["all"]


@pytest.mark.parametrize("url", ["http://localhost:1/weights.pth", "file:///nowhere/weights.pth"], ids=["port", "file"])
def test_without_a_connection_one_line_says_what_to_do(url: str, path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"cannot download .*/weights.pth \(.*\); fetch it elsewhere") as error:
        download(url, path)
    assert "\n" not in str(error.value)
    assert left_behind(path) == set()
