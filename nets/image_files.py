"""Image sets from files in the Hub's parquet layout, decoded once into resident tensors; and how files are fetched."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nets.images import ImageSet

IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "fine_label", "labels")
CHUNK = 1 << 16


Paths = str | Path | Sequence[str | Path]
Pixels = tuple[np.ndarray, np.ndarray]  # (n, height, width, channels) uint8, and classes (n,) int64


def read_parquet(
    train: Paths,
    test: Paths,
    classes: int = 0,
    name: str = "",
    dtype: torch.dtype = torch.float32,
    label: str = "",
) -> ImageSet:
    """Training and test images from parquet files of the Hub's layout, pixels / 255.

    Args:
        train, test: files, one or several parts in order, with a column ``img`` or ``image`` of encoded images
            ({bytes, path}, or bytes) and one of class numbers.
        classes: number of classes; the largest training label plus one when 0.
        name: what tables call it; the folder's name when empty.
        label: the column of class numbers; ``label``, ``fine_label`` or ``labels`` when empty.

    Returns:
        shapes (n, channels, height, width) and (n,), in the files' order.

    Raises:
        ValueError: a file that is missing, truncated or of another layout, images that cannot be decoded or differ in
            size, labels out of range; each with a sentence that names the file and the row.
    """
    files = [[Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)] for paths in (train, test)]
    if not all(files):
        raise ValueError("no file was given: name at least one of training and one of test images.")
    parts = [[(path, _table(path, label)) for path in some] for some in files]
    return image_set(parts[0], parts[1], classes, name or files[0][0].resolve().parent.name, dtype)


def image_set(
    train: Sequence[tuple[Path, Pixels]], test: Sequence[tuple[Path, Pixels]], classes: int, name: str,
    dtype: torch.dtype,
) -> ImageSet:  # fmt: skip
    """One set of the pixels and classes of each file, pixels / 255.

    Raises:
        ValueError: images of several sizes, labels out of range, with the file and the row.
    """
    classes = classes or max(int(y.max()) for _, (_, y) in train) + 1
    first, (pixels, _) = train[0]
    for path, (x, y) in (*train, *test):
        if x.shape[1:] != pixels.shape[1:]:
            raise ValueError(
                f"images of '{first}' are {_shape(pixels)} and those of '{path}' {_shape(x)}: give files of one image "
                "size."
            )
        wrong = np.flatnonzero((y < 0) | (y >= classes))
        if len(wrong):
            raise ValueError(
                f"row {wrong[0]} of '{path}' has label {y[wrong[0]]} and there are {classes} classes: "
                "mend the file or give the number of classes."
            )
    return ImageSet(*_tensors(train, dtype), *_tensors(test, dtype), classes, name)


def _tensors(parts: Sequence[tuple[Path, Pixels]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(np.concatenate([x for _, (x, _) in parts])).permute(0, 3, 1, 2)
    y = torch.from_numpy(np.concatenate([y for _, (_, y) in parts]))
    return x.to(dtype, memory_format=torch.contiguous_format).div_(255), y


def _shape(x: np.ndarray) -> str:
    return f"{x.shape[1]}x{x.shape[2]} with {x.shape[3]} channels"


def _table(path: Path, label: str) -> Pixels:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise ValueError(f"there is no file '{path}': check the path, or download it.")
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as fault:
        why = " ".join(str(fault).split())
        raise ValueError(f"'{path}' is no whole parquet file ({why}): download it again.") from fault
    columns = table.column_names
    image = next((column for column in IMAGE_COLUMNS if column in columns), None)
    number = label or next((column for column in LABEL_COLUMNS if column in columns), None)
    if image is None or number not in columns:
        raise ValueError(
            f"'{path}' has columns {', '.join(columns)}: give a file with images in 'img' or 'image' and class numbers "
            f"in {repr(label) if label else 'label'}."
        )
    if not table.num_rows:
        raise ValueError(f"'{path}' has no rows: give a file with images.")
    y = table.column(number)
    if not pyarrow.types.is_integer(y.type) or y.null_count:
        raise ValueError(f"column '{number}' of '{path}' is not whole numbers without gaps: give class numbers.")
    stored = table.column(image).to_pylist()
    return _decode(stored, path), y.to_numpy().astype(np.int64)


def _decode(stored: Sequence[object], path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    pixels: np.ndarray | None = None
    for row, item in enumerate(stored):
        data = item.get("bytes") if isinstance(item, dict) else item
        if not isinstance(data, bytes):
            raise ValueError(f"row {row} of '{path}' holds no image bytes: give a file with images inside, not paths.")
        try:
            decoded = np.asarray(Image.open(io.BytesIO(data)))
        except (UnidentifiedImageError, OSError, ValueError) as fault:
            raise ValueError(f"row {row} of '{path}' is no image that can be read: mend or drop that row.") from fault
        decoded = decoded[:, :, None] if decoded.ndim == 2 else decoded
        if pixels is None:
            pixels = np.empty((len(stored), *decoded.shape), np.uint8)
        if decoded.shape != pixels.shape[1:]:
            raise ValueError(
                f"row {row} of '{path}' is {_shape(decoded[None])} and row 0 {_shape(pixels)}: give images of one size."
            )
        pixels[row] = decoded
    assert pixels is not None
    return pixels


def download(url: str, path: str | Path, sha256: str = "", tries: int = 5, wait: float = 1.0) -> Path:
    """Fetch a file: resumed where it stopped, tried again with growing pauses, checked, put in place when whole.

    Args:
        sha256: of the whole file; not checked when empty.
        tries: attempts in a row that bring nothing new.
        wait: seconds before the second attempt; each further pause is twice as long.

    Returns:
        the path; a file that is there already and has the right checksum is not fetched.

    Raises:
        ValueError: it could not be fetched, or is not what the checksum says; what was fetched stays in ``path.part``
            in the first case, so that the next call goes on from there.
    """
    target = Path(path)
    if target.exists():
        if not sha256 or _sha256(target) == sha256:
            return target
        raise ValueError(f"'{target}' is not the file expected (its SHA-256 differs): move it away to download anew.")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    attempt = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part)
            break
        except (urllib.error.URLError, http.client.HTTPException, OSError) as fault:
            grown = part.exists() and part.stat().st_size > before
            attempt = 0 if grown else attempt + 1
            if attempt >= tries or (isinstance(fault, urllib.error.HTTPError) and fault.code in (401, 403, 404, 410)):
                raise ValueError(f"'{url}' could not be fetched ({fault}): check it, or give a local file.") from fault
            time.sleep(wait * 2 ** max(attempt - 1, 0))
    if sha256 and _sha256(part) != sha256:
        part.unlink()
        raise ValueError(f"'{url}' is not the file expected (its SHA-256 differs): check the address.")
    os.replace(part, target)
    return target


def _fetch(url: str, part: Path) -> None:
    """Append what is missing; a server that cannot resume sends all of it again."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as fault:
        if fault.code == 416 and have:  # nothing is missing
            return
        raise
    with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        expected, got = answer.headers.get("Content-Length"), 0
        while block := answer.read(CHUNK):
            file.write(block)
            got += len(block)
    if expected is not None and got < int(expected):
        raise ConnectionError(f"the connection ended after {got} of {expected} bytes")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
