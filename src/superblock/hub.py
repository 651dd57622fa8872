"""The Hugging Face hub: which weights are published, and how a file is fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from superblock.errors import CheckpointError

REPOSITORY = "facebook/superblock-vit-b-16"
SPARSITIES = ("0.70", "0.80", "0.82", "0.84", "0.86", "0.88", "0.90")
TILES = (16, 32, 64)
PUBLISHED = ("baseline", *(f"sp{sparsity}-ts{tile}" for sparsity in SPARSITIES for tile in TILES))

_URI = re.compile(r"hf://(?P<repo>[^/]+/[^/]+)/(?P<file>.+)")


def is_uri(path: str | Path) -> bool:
    """Whether a path names a file on the hub: ``hf://owner/name/file/in/repo``."""
    return str(path).startswith("hf://")


def published_name(path: Path) -> str | None:
    """The published weights that a local file's name stands for: ``superblock-vit-b-16-sp0.80-ts32.pth``."""
    name = path.name.removeprefix(f"{REPOSITORY.rpartition('/')[2]}-").removesuffix(".pth")
    return name if name in PUBLISHED else None


def fetch(uri: str) -> Path:
    """The local copy of ``hf://owner/name/file``, downloaded to the hub's cache unless it is there already.

    Raises:
        CheckpointError: not such an address, no such file, or no connection.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise CheckpointError(f"{uri} is no address on the hub: expected hf://owner/name/file")
    return download(parts["repo"], parts["file"])


def download(repository: str, file: str, folder: Path | None = None) -> Path:
    """Fetch one file of a repository to the hub's cache, or into ``folder``; an interrupted download goes on.

    The server is the one that ``HF_ENDPOINT`` names now, not when huggingface_hub was first imported.

    Raises:
        CheckpointError: no such repository or file, no connection, or no space.
    """
    from huggingface_hub import errors, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        return Path(hf_hub_download(repository, file, local_dir=folder, endpoint=endpoint))
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{endpoint} has no public repository {repository}: check the name") from error
    except errors.RemoteEntryNotFoundError as error:
        known = f"expected one of {', '.join(PUBLISHED)}" if repository == REPOSITORY else "check the name"
        raise CheckpointError(f"{repository} on {endpoint} has no file {file}: {known}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"cannot reach {endpoint} to fetch {repository}/{file}: check the connection, or set HF_ENDPOINT"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot fetch {repository}/{file} from {endpoint}: {reason}") from error
