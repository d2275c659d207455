"""A file from the web, gone on with where it was cut short; what is half there never takes the file's place."""

from __future__ import annotations

import logging
import ssl
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

logger = logging.getLogger(__name__)
TIMEOUT_SECONDS = 60
#: an attempt that brought something is followed by another, so many in all
MOST_ATTEMPTS = 5
CHUNK_BYTES = 1 << 20
PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 206, 416
#: a network's failures; a full disk is none
CUT = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def download(url: str, path: Path) -> None:
    """Fetch ``url`` to ``path``, going on with what an earlier call left in ``<path>.part``.

    A server that ignores ranges, or whose file has changed since, makes it start anew. Processes that want the same
    file wait for the first of them.

    Raises:
        ConnectionError: If it cannot be fetched, or not all of it; what has come is kept for the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        logger.info("downloading %s to %s", url, path)
        part = _Part(path)
        try:
            part.fetch(url)
        except CUT as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            kept = f"{part.size:,} bytes of it are kept, so try again; or " if part.size else ""
            message = f"cannot download {url} ({reason}); {kept}fetch it elsewhere and save it as {path}"
            raise ConnectionError(message) from error
        part.finish()


class _Part:
    """The beginning of a file, beside it, and the mark of the version that it is the beginning of."""

    def __init__(self, path: Path) -> None:
        self.target = path
        self.path, self.mark = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.mark")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def fetch(self, url: str) -> None:
        """Fetch what is missing, and again as long as that brings something."""
        for _ in range(MOST_ATTEMPTS):
            before = self.size
            try:
                total = self.read(url)
                if total is None or self.size == total:
                    return
                failure: Exception = ConnectionError(f"cut short at {self.size:,} of {total:,} bytes")
            except CUT as error:
                failure = error
            if self.size <= before:
                break
            logger.info("%s: the connection broke off, going on at %s bytes", self.target.name, f"{self.size:,}")
        raise failure

    def read(self, url: str) -> int | None:
        """Append what one request brings; returns the size of the whole file where the server tells it."""
        with self.open(url) as response:
            # a server that sends the whole file again ignores ranges, or holds another version by now
            start = self.size if getattr(response, "status", None) == PARTIAL_CONTENT else 0
            rest = response.headers["Content-Length"]
            total = None if rest is None else start + int(rest)
            self.mark.write_text(_version(response.headers))
            bar = tqdm(total=total, initial=start, desc=self.target.name, unit="B", unit_scale=True, disable=None)
            with bar, self.path.open("ab" if start else "wb") as file:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
        return total

    def open(self, url: str) -> Any:
        """A response with what is missing, or with everything."""
        version = self.mark.read_text() if self.size and self.mark.exists() else ""
        # If-Range: another version is sent from its beginning
        headers = {"Range": f"bytes={self.size}-", "If-Range": version} if version else {}
        try:
            return urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
        except HTTPError as error:
            if error.code != RANGE_NOT_SATISFIABLE:
                raise
            error.close()
        return urlopen(url, timeout=TIMEOUT_SECONDS)

    def finish(self) -> None:
        """Let it take the file's place."""
        self.path.replace(self.target)
        self.mark.unlink(missing_ok=True)


def _version(headers: Any) -> str:
    """What tells one version of a file from another: a strong ETag, else the date; empty where there is neither."""
    tag = headers["ETag"] or ""
    return tag if tag and not tag.startswith("W/") else headers["Last-Modified"] or ""
