"""Image sets from their authors' own files: CIFAR's binary archives and the idx files of MNIST and its likes.

Nothing is unpacked to disk and nothing is executed: both formats are plain bytes.
"""

from __future__ import annotations

import gzip
import math
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch

from nets.image_files import Pixels, image_set
from nets.images import ImageSet

SIDE, CHANNELS = 32, 3  # of a CIFAR image
BATCHES = tuple(f"data_batch_{k}.bin" for k in range(1, 6))


def read_cifar(path: str | Path, name: str = "", dtype: torch.dtype = torch.float32) -> ImageSet:
    """CIFAR-10 or CIFAR-100 (fine labels) from ``cifar-10-binary.tar.gz`` or ``cifar-100-binary.tar.gz``, pixels / 255.

    Raises:
        ValueError: a file that is missing, truncated or another archive.

    Source: Krizhevsky (2009); the layout is told on the data set's page.
    """
    path = _existing(path)
    try:
        with tarfile.open(path, "r:gz") as archive:
            found = {Path(member.name).name: member for member in archive.getmembers() if member.isfile()}
            fine = "train.bin" in found
            names = (("train.bin",), ("test.bin",)) if fine else (BATCHES, ("test_batch.bin",))
            absent = [file for some in names for file in some if file not in found]
            if absent:
                raise ValueError(f"'{path}' has no '{absent[0]}': give CIFAR's binary archive (…-binary.tar.gz).")
            data = [[archive.extractfile(found[file]) for file in some] for some in names]
            raw = [b"".join(part.read() for part in some if part is not None) for some in data]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as fault:
        raise ValueError(f"'{path}' is no whole .tar.gz archive ({fault}): download it again.") from fault
    train, test = ([(path, _records(some, 2 if fine else 1, path))] for some in raw)
    return image_set(train, test, 100 if fine else 10, name or ("CIFAR-100" if fine else "CIFAR-10"), dtype)


def _records(data: bytes, labels: int, path: Path) -> Pixels:
    """Records of so many label bytes, of which the last is used, and then pixels, channel after channel."""
    size = labels + CHANNELS * SIDE**2
    if not data or len(data) % size:
        raise ValueError(f"'{path}' holds {len(data)} bytes of images, not records of {size}: download it again.")
    rows = np.frombuffer(data, np.uint8).reshape(-1, size)
    pixels = rows[:, labels:].reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    return pixels, rows[:, labels - 1].astype(np.int64)


def read_idx(
    train_images: str | Path, train_labels: str | Path, test_images: str | Path, test_labels: str | Path,
    classes: int = 10, name: str = "", dtype: torch.dtype = torch.float32,
) -> ImageSet:  # fmt: skip
    """Grey images and labels from idx files, gzipped or not, as MNIST, Fashion-MNIST, KMNIST, EMNIST have them; / 255.

    Args:
        classes: number of classes; the largest training label plus one when 0.
        name: what tables call it; the folder's name when empty.

    Raises:
        ValueError: a file that is missing, truncated or of another layout, labels out of range.

    Source: LeCun, Cortes, Burges, "The MNIST database" (the layout).
    """
    sets = []
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        path = Path(images)
        x, y = _idx(images, 3), _idx(labels, 1)
        if len(x) != len(y):
            raise ValueError(f"'{path}' has {len(x)} images and '{labels}' {len(y)} labels: give files that match.")
        sets.append([(path, (x[..., None], y.astype(np.int64)))])
    return image_set(sets[0], sets[1], classes, name or Path(train_images).resolve().parent.name, dtype)


def _idx(path: str | Path, axes: int) -> np.ndarray:
    """One idx file: two zero bytes, 8 for unsigned bytes, the number of axes, each length (big-endian), the entries."""
    path = _existing(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (EOFError, OSError, zlib.error) as fault:
        raise ValueError(f"'{path}' is no whole .gz file ({fault}): download it again.") from fault
    header = 4 + 4 * axes
    if len(data) < header or data[:4] != bytes((0, 0, 8, axes)):
        kind = "images" if axes == 3 else "labels"
        raise ValueError(f"'{path}' is no idx file of {kind}: give one, e.g. train-{kind}-idx{axes}-ubyte.gz.")
    shape = tuple(int(length) for length in np.frombuffer(data, ">u4", axes, 4))
    if len(data) - header != math.prod(shape) or not math.prod(shape):
        raise ValueError(
            f"'{path}' holds {len(data) - header} entries and says {' x '.join(map(str, shape))}: download it again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"there is no file '{path}': check the path, or download it.")
    return Path(path)
