"""The process that workers are forked from. Importing this does not import torch."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable
from multiprocessing import forkserver


def start_server(suites: Iterable[str]) -> None:
    """Start the server, unless it runs, with what these suites need; it imports that while this process goes on.

    It has started no threads of ours when workers are forked from it. A terminal sends SIGINT to the whole group: the
    server and its workers never get it, this process alone answers.
    """
    parts = ("workers", "report", *sorted(set(suites)))
    multiprocessing.set_forkserver_preload([f"validation.{part}" for part in parts])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
