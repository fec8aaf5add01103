"""Known image sets by name, with the address and, where it is known, the SHA-256 of every file: the only such table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nets.image_archives import read_cifar, read_idx
from nets.image_files import download, read_parquet
from nets.images import ImageSet

HUB = "https://huggingface.co/datasets"
CVDF = "https://storage.googleapis.com/cvdf-datasets/mnist"
ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
TORONTO = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class File:
    """Where a file is, and its SHA-256; empty where only the user can say it."""

    address: str
    sha256: str = ""

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Source:
    """An image set: its files in the order in which their reader takes them, and its number of classes."""

    layout: Literal["parquet", "cifar", "idx"]
    files: tuple[File, ...]
    classes: int


def _hub(path: str, classes: int) -> Source:
    """The Hub's files can change under their address, so their checksums are the user's to give."""
    files = tuple(File(f"{HUB}/{path}/{part}-00000-of-00001.parquet") for part in ("train", "test"))
    return Source("parquet", files, classes)


def _idx(address: str, *sha256: str) -> Source:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    return Source(
        "idx", tuple(File(f"{address}/{part}-ubyte.gz", s) for part, s in zip(parts, sha256, strict=True)), 10
    )


SOURCES: dict[str, Source] = {
    "cifar10": _hub("uoft-cs/cifar10/resolve/main/plain_text", 10),
    "cifar100": _hub("uoft-cs/cifar100/resolve/main/cifar100", 100),
    "svhn": _hub("ufldl-stanford/svhn/resolve/main/cropped_digits", 10),
    # The authors' own archives; their host has been slow since June 2026.
    "cifar10-archive": Source(
        "cifar",
        (
            File(
                f"{TORONTO}/cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
            ),
        ),
        10,
    ),
    "cifar100-archive": Source(
        "cifar",
        (
            File(
                f"{TORONTO}/cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
            ),
        ),
        100,
    ),
    "mnist": _idx(
        CVDF,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion-mnist": _idx(
        ZALANDO,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}
"""SHA-256 of the archives and idx files as TensorFlow Datasets lists them."""


def known_images(
    name: str, folder: str | Path, checksums: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32
) -> ImageSet:
    """One of :data:`SOURCES`, pixels / 255; files that are not in ``folder``/``name`` yet are fetched to there.

    Args:
        checksums: SHA-256 by file name, for files whose checksum the table does not know, or to replace one.

    Raises:
        ValueError: an unknown name or file, a file that cannot be fetched or read, or that differs from its checksum.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, 1)
        hint = f"did you mean '{near[0]}'? choose" if near else "choose"
        raise ValueError(
            f"there is no image set '{name}': {hint} one of {', '.join(SOURCES)}, or read files of your own."
        )
    source, given = SOURCES[name], checksums or {}
    names = [file.name for file in source.files]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"'{name}' has no file '{unknown[0]}': give checksums of {', '.join(names)}.")
    paths = [
        download(file.address, Path(folder) / name / file.name, given.get(file.name, file.sha256))
        for file in source.files
    ]
    if source.layout == "cifar":
        return read_cifar(paths[0], name, dtype)
    if source.layout == "idx":
        return read_idx(paths[0], paths[1], paths[2], paths[3], source.classes, name, dtype)
    return read_parquet(paths[0], paths[1], source.classes, name, dtype)
