"""What the long stages of a run leave while it is not done: killed, it goes on after the last one, bit for bit.

A stage's result is a file in the run's folder: SHA-256, then what ``torch.save`` writes. It is read back only by the
same code with the same libraries, whole, and as tensors, arrays and this package's own records: nothing else in a file
is executed. Stages are gone when the run is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from validation.store import replacing, uninterrupted, writing

OURS = ("theory.", "simulators.", "nets.", "validation.")
ARRAYS: list[Any] = [
    np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "bool", "U1", "O")),
]  # fmt: skip


class Stages:
    """The stages of one run.

    Args:
        folder: where their files are.
        code: digest of the package's source; files of other code or other libraries are not used.
        say: told when a file is damaged.
    """

    def __init__(self, folder: Path, code: str, say: Callable[[str], object] = lambda message: None) -> None:
        libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "numba", "scipy")]
        self._folder, self._key, self._say = folder, " ".join([code, *libraries]), say
        self._used: set[str] = set()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """The kept result of ``work``, or a new one that is kept from now on.

        Raises:
            ValueError: a name that this run has used already.
        """
        if name in self._used:
            raise ValueError(f"the stage '{name}' has two results: give each a name of its own.")
        self._used.add(name)
        path = self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.pt"
        if path.exists():
            kept = self._read(path, name)
            if kept is not None:
                return kept[0]
        result = work()
        self._write(path, name, result)
        return result

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, path: Path, name: str) -> tuple[Any] | None:
        data = path.read_bytes()
        digest, payload = data[:64], data[64:]
        if digest != _digest(payload):
            self._say(f"stage '{name}' in {path} is damaged: it is done again")
            return None
        with torch.serialization.safe_globals([*ARRAYS, *_records(payload)]):
            try:
                saved = torch.load(io.BytesIO(payload), weights_only=True)
            except pickle.UnpicklingError as fault:
                asked = re.search(r"GLOBAL (\S+)", str(fault))
                what = f"it asks for {asked[1]}" if asked else "it is no stage"
                self._say(f"stage '{name}' in {path} cannot be read ({what}): it is done again")
                return None
        return (saved["result"],) if (saved["key"], saved["name"]) == (self._key, name) else None

    def _write(self, path: Path, name: str, result: Any) -> None:
        buffer = io.BytesIO()
        torch.save({"key": self._key, "name": name, "result": result}, buffer)
        payload = buffer.getvalue()
        with writing(self._folder.parent), uninterrupted():
            self._folder.mkdir(exist_ok=True)
            with replacing(path) as temporary, open(temporary, "wb") as file:
                file.write(_digest(payload))
                file.write(payload)


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()


def _records(payload: bytes) -> list[type]:
    """The package's own classes that a file asks for."""
    found = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(payload)):
        module, _, kind = name.rpartition(".")
        if module.startswith(OURS):
            with contextlib.suppress(ImportError):
                record = getattr(importlib.import_module(module), kind, None)
                if isinstance(record, type) and record.__module__ == module:
                    found.append(record)
    return found
