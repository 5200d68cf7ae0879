"""Where the weights of the feature networks are found, and that they are what they should be.

A file is looked for where a person says, then in torch.hub's folder (which torch-fidelity uses too), and fetched
only when a person asks for it. A published file is used only if its sha256 is right. /tmp, where clean-fid looks,
is never looked at.
"""

from __future__ import annotations

import urllib.error
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from xar_cli.errors import UserError
from xar_cli.hub import sha256_of
from xar_cli.logs import log
from xar_cli.run_dir import format_bytes, is_file, require_writable


@dataclass(frozen=True)
class PublishedWeights:
    """A weights file that a library publishes.

    Attributes:
        filename: its name, in torch.hub's folder too.
        url: where the library itself fetches it.
        sha256: of the whole file. (torch-fidelity and torchvision put its first eight digits into the name;
            clean-fid publishes none, this is the one that projects using the file have recorded.)
        size: bytes.
        torchscript: whether it is a TorchScript archive, not a state dict.
        option: the command-line option that names such a file.
    """

    filename: str
    url: str
    sha256: str
    size: int
    torchscript: bool
    option: str

    @property
    def cached_path(self) -> Path:
        """Where torch.hub keeps it, or would."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.filename


PUBLISHED = {
    "inception": PublishedWeights(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        95_628_359,
        torchscript=False,
        option="--inception-weights",
    ),
    "inception-clean": PublishedWeights(
        "inception-2015-12-05.pt",
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        95_607_719,
        torchscript=True,
        option="--inception-weights",
    ),
    "vgg16": PublishedWeights(
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        553_433_881,
        torchscript=False,
        option="--vgg16-weights",
    ),
}


@dataclass(frozen=True)
class Weights:
    """A weights file that was found.

    Attributes:
        published: whether it is the published file; numbers from other weights compare with nothing.
    """

    path: Path
    sha256: str
    published: bool


def find_weights(network: str, given: Sequence[Path] = (), download: bool = False) -> Weights:
    """The weights of a network: from the given files, else torch.hub's folder, else by download where that is allowed.

    Raises:
        UserError: none found, a given file is missing, or one in torch.hub's folder is damaged.
    """
    file, passed_over = PUBLISHED[network], []
    for path in given:
        if not is_file(path):
            raise UserError(f"There is no weights file '{path}'.", f"Check {file.option}.")
        if is_torchscript(path) == file.torchscript:
            digest = sha256_of(path)
            if digest != file.sha256:
                log.warning(f"'{path}' is not the published {file.filename}: its numbers compare with no others")
            return Weights(path, digest, digest == file.sha256)
        passed_over.append(f"'{path}'")
    path = file.cached_path
    if not path.is_file():
        if not download:
            raise UserError(
                f"The weights '{file.filename}' ({format_bytes(file.size)}) are not here"
                + (f", and {file.option} names others: {', '.join(passed_over)}." if passed_over else "."),
                f"Give the file with {file.option}, or let it be fetched from {file.url} with --download.",
            )
        fetch(file)
    if sha256_of(path) != file.sha256:
        raise UserError(f"'{path}' is damaged: its sha256 is not {file.sha256}.", "Remove it and fetch it again.")
    return Weights(path, file.sha256, True)


def fetch(file: PublishedWeights) -> Path:
    """Fetch a file into torch.hub's folder; it appears there only if its sha256 is right.

    Raises:
        UserError: no room, no connection, or another file than expected came (exit code 1).
    """
    path = file.cached_path
    require_writable(path.parent, 2 * file.size, f"the weights '{file.filename}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info(f"fetching {file.url} ({format_bytes(file.size)}) to '{path}'")
    try:
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.sha256, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"Fetching '{file.url}' failed: {error}.",
            f"Try again, or fetch it elsewhere and give it with {file.option}.",
            exit_code=1,
        ) from None
    return path


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip that carries code. A damaged one is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
