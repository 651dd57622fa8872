"""The Hugging Face hub: which weights are published, and how a file is fetched, resumed and kept.

``huggingface_hub`` speaks to the hub and keeps the cache. Only the transfer itself is done here, over its session: it
throws the part of an interrupted download away (seen in 2.4), and these files are large, so here a part is kept beside
the file's place and the next attempt goes on from there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from superblock.errors import CheckpointError
from superblock.files import write_atomically

REPOSITORY = "facebook/superblock-vit-b-16"
SPARSITIES = ("0.70", "0.80", "0.82", "0.84", "0.86", "0.88", "0.90")
TILES = (16, 32, 64)
PUBLISHED = ("baseline", *(f"sp{sparsity}-ts{tile}" for sparsity in SPARSITIES for tile in TILES))

_URI = re.compile(r"hf://(?P<repo>[^/]+/[^/]+)/(?P<file>.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_uri(path: str | Path) -> bool:
    """Whether a path names a file on the hub: ``hf://owner/name/file/in/repo``."""
    return str(path).startswith("hf://")


def local_name(name: str, repository: str = REPOSITORY) -> str:
    """The file that published weights are kept in: ``superblock-vit-b-16-sp0.80-ts32.pth``."""
    return f"{repository.rpartition('/')[2]}-{name}.pth"


def published_name(path: Path) -> str | None:
    """The published weights that a local file's name stands for, the inverse of :func:`local_name`."""
    return next((name for name in PUBLISHED if path.name == local_name(name)), None)


def fetch(uri: str) -> Path:
    """The local copy of ``hf://owner/name/file``, downloaded to the hub's cache unless it is there already.

    Without a connection the copy in the cache is taken as it is.

    Raises:
        CheckpointError: not such an address, no such file, no connection, or no space.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise CheckpointError(f"{uri} is no address on the hub: expected hf://owner/name/file")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    repository, file = parts["repo"], parts["file"]
    cache = cache_folder()
    try:
        metadata = _metadata(repository, file)
    except _NoConnectionError:
        cached = try_to_load_from_cache(repository, file, cache_dir=cache)
        if isinstance(cached, str):
            return Path(cached)
        raise
    # The blob lies where huggingface_hub looks for it: it finds its file there and only enters it into its index.
    blob = cache / repo_folder_name(repo_id=repository, repo_type="model") / "blobs" / metadata.etag
    if not blob.exists():
        _retrieve(metadata, blob, file)
    with _told(repository, file):
        return Path(hf_hub_download(repository, file, cache_dir=cache, endpoint=endpoint()))


def download(repository: str, file: str, target: Path) -> bool:
    """Fetch one file of a repository to ``target``; an interrupted download goes on where it stopped.

    Returns:
        Whether anything had to be fetched: not where ``target`` is that file already.

    Raises:
        CheckpointError: no such repository or file, no connection, or no space; ``target`` is as it was.
    """
    from huggingface_hub import try_to_load_from_cache

    metadata = _metadata(repository, file)
    if target.is_file() and metadata.size is not None and _is_whole(target, metadata):
        return False
    cached = try_to_load_from_cache(repository, file, cache_dir=cache_folder(), revision=metadata.commit_hash)
    if isinstance(cached, str):
        write_atomically(target, lambda temporary: shutil.copyfile(cached, temporary))
    else:
        _retrieve(metadata, target, file)
    return True


def endpoint() -> str:
    """The server: ``HF_ENDPOINT`` as it is now, not as it was when huggingface_hub was imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def cache_folder() -> Path:
    """The hub's cache: ``HF_HUB_CACHE`` as it is now, else huggingface_hub's own choice."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)


class _NoConnectionError(CheckpointError):
    """The server cannot be reached; a copy in the cache may still do."""


def _metadata(repository: str, file: str) -> Any:
    """What the server says of a file: ``etag``, ``size``, ``commit_hash`` and ``location``."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _told(repository, file):
        metadata = get_hf_file_metadata(hf_hub_url(repository, file, endpoint=endpoint()), endpoint=endpoint())
        if metadata.etag is None or metadata.commit_hash is None:
            raise CheckpointError(
                f"{endpoint()} does not answer as a hub does (no ETag or X-Repo-Commit): check HF_ENDPOINT"
            )
        return metadata


def _retrieve(metadata: Any, target: Path, file: str) -> None:
    """Download into a part beside ``target``, going on from what is there, and rename it when it is whole."""
    from huggingface_hub import errors
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if urlsplit(metadata.location).netloc != urlsplit(endpoint()).netloc:
        headers.pop("authorization", None)  # A storage server's address is signed; the hub's token is not for it.
    part = target.with_name(f".{target.name}.{metadata.etag[:16]}.incomplete")
    with _told(target.name, file):
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(part.with_suffix(".lock")):
            if target.is_file() and metadata.size is not None and _is_whole(target, metadata):
                return  # Another process was faster.
            if part.is_file() and metadata.size is not None and part.stat().st_size > metadata.size:
                part.unlink()
            with part.open("ab") as stream:
                while metadata.size is None or stream.tell() < metadata.size:
                    before = stream.tell()
                    try:
                        _transfer(metadata.location, stream, headers, metadata.size, file.rpartition("/")[2])
                        break
                    except errors.HTTPError:
                        if stream.tell() <= before:  # As long as something arrives, it is worth going on.
                            raise
                os.fsync(stream.fileno())
            if not _is_whole(part, metadata):
                part.unlink()
                raise CheckpointError(f"{file} came damaged from {endpoint()} and was thrown away: download it again")
            part.replace(target)
        part.with_suffix(".lock").unlink(missing_ok=True)


def _transfer(url: str, stream: BinaryIO, headers: dict[str, str], size: int | None, name: str) -> None:
    """Append to ``stream`` what it lacks of the file at ``url``."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status, tqdm

    start = stream.tell()
    span = {"Range": f"bytes={start}-"} if start else {}
    with get_session().stream("GET", url, headers={**headers, **span}, follow_redirects=True, timeout=30) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # A server that knows no ranges begins again.
            stream.truncate(0)
            stream.seek(0)
            start = 0
        with tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=name, disable=None) as progress:
            for chunk in response.iter_bytes():
                stream.write(chunk)
                stream.flush()
                progress.update(len(chunk))


def _is_whole(path: Path, metadata: Any) -> bool:
    """Whether a file has the size, and where the hub tells it the SHA-256, of the one on the hub."""
    if metadata.size is not None and path.stat().st_size != metadata.size:
        return False
    if not _SHA256.fullmatch(metadata.etag):
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == metadata.etag


@contextmanager
def _told(repository: str, file: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    from huggingface_hub import errors

    server = endpoint()
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError):
            raise CheckpointError(f"{server} has no public repository {repository}: check the name") from error
        if status == 404:
            raise CheckpointError(f"{repository} on {server} has no file {file}: {_known(repository)}") from error
        raise CheckpointError(f"{server} answered {status} for {repository}/{file}: try again later") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise _NoConnectionError(
            f"cannot reach {server} to fetch {repository}/{file}: check the connection, or set HF_ENDPOINT"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(f"cannot fetch {repository}/{file}: {reason}") from error


def _known(repository: str) -> str:
    if repository != REPOSITORY:
        return "check the name"
    return f"expected checkpoints/<name>.pth with <name> one of {', '.join(PUBLISHED)}"
