"""Files on the Hugging Face hub: named `hf://owner/repo/file[@revision]`, fetched into the hub's own cache.

Owns: reading such names, fetching one file, the table of published weights, uploading, and the sha256 of any file,
by which the hub knows it. Where the cache lies, which server is asked and whether it is asked at all is
huggingface-hub's business: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE. A file is fetched only where a person names it;
nothing is fetched by default.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from xar_cli.errors import UserError
from xar_cli.run_dir import require_possible, require_writable

_NAME = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)/(?P<file>[^@]+)(?:@(?P<revision>.+))?")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DISK_FAULTS = {  # of the disk that holds the cache, not of the network
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.EEXIST, errno.EISDIR,
}  # fmt: skip


@dataclass(frozen=True)
class HubFile:
    """One file in a repository on the hub.

    Attributes:
        repo: `owner/name`.
        filename: path inside the repository.
        revision: branch, tag or commit; None for the main branch.
    """

    repo: str
    filename: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.filename}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class PublishedFile:
    """Weights that others have published, as `xar weights download NAME` offers them.

    Attributes:
        file: where they lie.
        megabytes: about how large they are, from the number of parameters.
        licence: what is known of the terms.
    """

    file: HubFile
    megabytes: int
    licence: str


_NO_LICENCE = "none stated: the authors published neither code nor weights under a licence"

PUBLISHED = {
    "base": PublishedFile(HubFile("OliverRen/xAR", "xAR-B.pth"), 691, _NO_LICENCE),
    "large": PublishedFile(HubFile("OliverRen/xAR", "xAR-L.pth"), 2434, _NO_LICENCE),
    "huge": PublishedFile(HubFile("OliverRen/xAR", "xAR-H.pth"), 4744, _NO_LICENCE),
    "kl16": PublishedFile(
        HubFile("xwen99/mar-vae-kl16", "kl16.ckpt"), 266, "see the repository: a mirror of MAR's file"
    ),
}


def parse_hub_name(source: str | Path) -> HubFile | None:
    """The file that `hf://owner/repo/file[@revision]` names; None for anything that does not begin with
    `hf:/`.

    A name that went through `Path` and lost a slash is understood too.

    Raises:
        UserError: it begins like a hub name but is none.
    """
    text = str(source)
    if not text.startswith("hf:/"):
        return None
    match = _NAME.fullmatch(text)
    if match is None or {"", ".", ".."} & set(match["file"].split("/")):
        raise UserError(
            f"'{text}' is not a file on the hub.",
            "Write it as hf://owner/repo/file, with @revision if need be.",
        )
    return HubFile(match["repo"], match["file"], match["revision"])


def absolute_source(source: Path) -> Path:
    """A path made absolute, for another process to open; a hub name stays as it is."""
    return source.absolute() if parse_hub_name(source) is None else source


def local_file(source: str | Path) -> Path:
    """The local path of a source: a path as it is, a hub name after fetching it (or from the cache).

    Raises:
        UserError: the hub does not have it, refuses it, or cannot be reached and the cache has no copy; a path that
            the system does not take.
    """
    file = parse_hub_name(source)
    if file is not None:
        return fetch(file)
    path = Path(source)
    require_possible(path)
    return path


def fetch(file: HubFile) -> Path:
    """Fetch a file into the hub's cache, or find it there; raises UserError as `local_file` does."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(str(file)):
        return Path(hf_hub_download(file.repo, file.filename, revision=file.revision))


def remote_facts(file: HubFile) -> tuple[int | None, str | None]:
    """Size in bytes and sha256 that the hub records for a file (None where it records none)."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _hub_errors(str(file)):
        facts = get_hf_file_metadata(hf_hub_url(file.repo, file.filename, revision=file.revision))
    etag = facts.etag or ""
    return facts.size, etag if is_sha256(etag) else None


def cached(file: HubFile) -> Path | None:
    """Where a file lies in the hub's cache, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(file.repo, file.filename, revision=file.revision)
    return Path(path) if isinstance(path, str) else None


def require_room(size: int) -> None:
    """Raise a UserError unless the hub's cache can take a file of so many bytes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    require_writable(Path(HF_HUB_CACHE), size, "the hub's cache (HF_HOME)")


def recorded_sha256(path: Path) -> str | None:
    """The sha256 that the hub stated when a file was fetched; the cache names large files by it, others not: None."""
    name = path.resolve().name
    return name if is_sha256(name) else None


def keep_if_sound(path: Path, expected: str) -> None:
    """Remove a file of the hub's cache that has not the expected sha256; a UserError (exit code 1) says so."""
    found = sha256_of(path)
    if found != expected:
        path.resolve().unlink()  # the cache links to it, and would link again
        path.unlink(missing_ok=True)
        raise UserError(
            f"'{path}' was damaged: its sha256 was {found}, not {expected}.",
            "It was removed: the same command fetches it again.",
            exit_code=1,
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def is_sha256(text: str) -> bool:
    """Whether a text has the form of what `sha256_of` gives."""
    return _SHA256.fullmatch(text) is not None


def require_repo_name(repo: str) -> None:
    """Raise a UserError unless `repo` has the form owner/name."""
    if not _REPO.fullmatch(repo):
        raise UserError(f"'{repo}' is not a repository on the hub.", "Write it as owner/name.")


def open_repo(repo: str, private: bool) -> str:
    """Make a model repository where it does not exist; returns its address. Fails where one may not write there."""
    from huggingface_hub import HfApi

    with _hub_errors(f"hf://{repo}"):
        return str(HfApi().create_repo(repo, private=private, exist_ok=True))


def upload(folder: Path, repo: str, message: str) -> None:
    """Put a folder's files in a model repository."""
    from huggingface_hub import HfApi

    with _hub_errors(f"hf://{repo}"):
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface-hub raises into sentences."""
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Its bases are the errors of whichever client the library uses (requests, httpx, ...): those of the connection too.
    failures = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, OSError))
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"'{what}' is behind a gate on the hub.",
            "Ask for access on its page, then log in with `hf auth login`.",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"The hub has no repository for '{what}', or it is private.",
            "Check the spelling, or log in with `hf auth login`.",
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"The hub has no such revision: '{what}'.", "Check what stands after the @.") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise UserError(
            f"'{what}' is not in the local cache and the hub cannot be reached (or HF_HUB_OFFLINE is set).",
            "Check the connection, or fetch the file elsewhere and give its path.",
            exit_code=1,
        ) from None
    except EntryNotFoundError:
        raise UserError(f"The repository has no such file: '{what}'.", "Check the file name on its page.") from None
    except HFValidationError as error:
        raise UserError(f"'{what}' is not a valid name on the hub: {error}.", "Write it as owner/name.") from None
    except failures as error:
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            where = f" at '{error.filename}'" if error.filename else ""
            raise UserError(
                f"The disk failed{where} while '{what}' was exchanged with the hub: {error.strerror}.",
                "Free some space, or set HF_HOME to a folder that can be written.",
                exit_code=1,
            ) from None
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The exchange with the hub about '{what}' failed: {line}.",
            "Check the connection and try again; for an upload check also that you are logged in (`hf auth login`) and "
            "may write there.",
            exit_code=1,
        ) from None
