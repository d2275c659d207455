"""Where a shared model lies: a file, a folder as timm writes them, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slabformer._extras import require

#: timm's words for the two places, before a colon
HUB, FOLDER = "hf-hub", "local-dir"
#: ``name`` of the hub's first days, or ``user/name``
REPOSITORY = re.compile(r"(?:[A-Za-z0-9][\w.\-]*/)?[A-Za-z0-9][\w.\-]*")
#: of one question whether there is such a repository
HUB_TIMEOUT_SECONDS = 10.0
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def is_shared(source: str) -> bool:
    """Whether ``source`` names a place as timm does: ``hf-hub:user/name``, ``local-dir:folder``."""
    return source.startswith((f"{HUB}:", f"{FOLDER}:"))


def weights_file(source: str | Path) -> Path:
    """The safetensors file of ``source``, fetched from the hub into its cache where that is the place.

    Args:
        source: A file; a folder, with or without ``local-dir:`` before it; or ``hf-hub:user/name``, with ``@revision``
            behind it if not its newest.

    Raises:
        FileNotFoundError: If the folder or the repository holds no ``model.safetensors``.
        ConnectionError: If the hub cannot be reached and its cache does not hold the file.
    """
    kind, _, place = str(source).partition(":")
    if kind == HUB:
        return _fetch(place)
    path = Path(place if kind == FOLDER else source)
    if kind == FOLDER and not path.is_dir():
        raise FileNotFoundError(f"no folder {str(path)!r} to load a model from")
    if path.is_dir() and not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {str(path)!r}; give a file, or a folder that `slab push` wrote")
    return path / WEIGHTS if path.is_dir() else path


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can be a repository, ``user/name`` or ``name``, rather than a path that is not there."""
    *folders, _ = name.split("/")
    return REPOSITORY.fullmatch(name) is not None and not any(Path(folder).is_dir() for folder in folders)


def check_on_hub(name: str, file: str) -> None:
    """Look for ``file`` of a repository in the cache, else ask the hub once: loading would retry for half a minute.

    Raises:
        FileNotFoundError: If the hub knows no such repository, or none that you may read.
        ConnectionError: If it is not in the cache and the hub cannot be reached, or may not be (``HF_HUB_OFFLINE``).
    """
    hub = require("huggingface_hub", extra="lm")
    if isinstance(hub.try_to_load_from_cache(name, file), str):
        return
    nowhere = f"no folder {name!r} here, and it is not in the hub's cache"
    if hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{nowhere}; HF_HUB_OFFLINE forbids to ask the hub")
    errors = hub.errors
    try:
        hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        raise FileNotFoundError(f"no folder {name!r} here, and the hub has no such model that you may read") from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"no folder {name!r} here, and no name that the hub allows") from error
    except (errors.HTTPError, OSError) as error:
        raise ConnectionError(f"{nowhere}; the hub cannot be reached ({_first(error)})") from error


def upload(folder: Path, repo: str, *, private: bool = False, message: str = "Add model") -> str:
    """Put ``folder`` into a repository on the hub, created if it is not there; a model card that is there stays.

    Returns:
        The repository's full name.

    Raises:
        ConnectionError: If the hub cannot be reached or refuses.
    """
    with _hub_errors(repo):
        api = require("huggingface_hub", extra="vision").HfApi(library_name="slabformer")
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        kept = [CARD] if api.file_exists(repo_id=name, filename=CARD) else None
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message, ignore_patterns=kept)
        return name


def _fetch(place: str) -> Path:
    repo, _, revision = place.partition("@")
    with _hub_errors(repo):
        hub = require("huggingface_hub", extra="vision")
        return Path(hub.hf_hub_download(repo, WEIGHTS, revision=revision or None, library_name="slabformer"))


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    errors = require("huggingface_hub.errors", extra="vision")
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        message = f"cannot reach the hub for {repo!r}, and its cache does not hold {WEIGHTS}"
        raise ConnectionError(message) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(f"the hub has no {WEIGHTS} at {repo!r} that you may read: {_first(error)}") from error
    except (errors.HTTPError, OSError) as error:
        raise ConnectionError(f"the hub did not take or give {repo!r}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
