"""Runs made by worker processes: on this machine, a dask cluster, or Slurm through submitit.

A run's results depend on its settings alone: torch and BLAS have one thread wherever it runs, and compiled loops give
the same bits on any number of threads. Whoever is stopped or killed, the same command goes on with what is not done.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import numba
import scipy.linalg  # noqa: F401, its BLAS has to be there before it is pinned
import torch
from threadpoolctl import threadpool_limits

from validation.run_directory import load, run_name, run_or_load
from validation.server import start_server
from validation.settings import RunSettings, SettingsError
from validation.suite import SUITES, Progress, cost

Engine = Literal["local", "dask", "slurm"]
RETRIES = 3
CONTEXT_MIB = 600
"""GPU memory that a process takes before it computes anything."""


@dataclass(frozen=True)
class Task:
    """A suite with its settings, to be run or found done below ``root``.

    Attributes:
        device: "cpu" or "cuda".
        fresh, mode, wait: as for :func:`validation.run_directory.run_or_load`.
        threads: of compiled loops over replicates.
        draw: the report's figures too, once no run waits for a worker any more.
    """

    root: str
    suite: str
    settings: RunSettings
    device: str
    fresh: bool = False
    mode: str = "quiet"
    wait: bool = True
    threads: int = 1
    draw: bool = False

    @property
    def name(self) -> str:
        """Its run directory's name."""
        return run_name(self.suite, self.settings, torch.device(self.device))


@dataclass(frozen=True)
class TaskResult:
    """How a task ended: its run's name, whether it was run now, and what went wrong (``""`` for nothing).

    ``misused``: what went wrong is the settings' fault, and the sentence says what to do.
    """

    name: str
    fresh: bool
    fault: str = ""
    misused: bool = False


def run_task(task: Task) -> TaskResult:
    """One task in this process. Whatever goes wrong is said, not raised: a run must not take others with it."""
    say = Progress(task.mode, suite=task.suite).say
    say(f"{task.suite}: {SUITES[task.suite]}")
    try:
        with _pinned(task.threads):
            _, ran = run_or_load(
                Path(task.root), task.suite, task.settings, torch.device(task.device), mode=task.mode,
                fresh=task.fresh, wait=task.wait,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        fault = f"suite {task.suite} ran out of memory on {task.device}: choose fewer --seeds or --workers."
        return TaskResult(task.name, False, fault, misused=True)
    except ValueError as fault:
        return TaskResult(task.name, False, str(fault), misused=True)
    except Exception as fault:
        say(traceback.format_exc())
        return TaskResult(task.name, False, " ".join(f"{type(fault).__name__}: {fault}".split()))
    if not ran:
        say(f"  {task.suite}: done before, in {Path(task.root) / task.name} (--fresh runs it again)")
    return TaskResult(task.name, ran)


def run_tasks(
    tasks: Sequence[Task], *, engine: Engine = "local", workers: int = 1, scheduler: str = "",
    told: Callable[[int, TaskResult], object] = lambda number, result: None,
) -> list[TaskResult]:  # fmt: skip
    """Run tasks in the order given, as workers come free; results in the same order.

    Args:
        engine: worker processes on this machine (one worker: this process), a dask cluster, or Slurm.
        workers: see :func:`workers_for`; 0 on a cluster for as many as it gives.
        scheduler: address of the dask scheduler; a local cluster when empty.
        told: called with a task's number and result when it ends; what it raises stops the rest.

    Raises:
        SettingsError: an engine that is not installed.
    """
    run: Callable[..., Results] = {"local": _local, "dask": _dask, "slurm": _slurm}[engine]
    done: dict[int, TaskResult] = {}
    attempts = 0
    while len(done) < len(tasks):
        pending = [number for number in range(len(tasks)) if number not in done]
        before = len(done)
        try:
            with contextlib.closing(run(pending, tasks, workers, scheduler)) as results:
                for number, result in results:
                    done[number] = result
                    told(number, result)
        except BrokenProcessPool:
            attempts = attempts + 1 if len(done) == before else 0
            if attempts >= RETRIES:
                lost = f"its worker was killed {RETRIES} times in a row (out of memory?): choose fewer --workers"
                done |= {number: TaskResult(tasks[number].name, False, lost) for number in pending}
    return [done[number] for number in range(len(tasks))]


def workers_for(asked: int, suites: Sequence[str], device: torch.device) -> int:
    """Worker processes for these suites: as asked, else one a core, on a GPU as many as its free memory holds.

    Raises:
        SettingsError: a negative number.
    """
    if asked < 0:
        raise SettingsError(f"{asked} workers is not usable: choose 1 or more, or 0 for one a core.")
    if asked:
        return min(asked, max(len(suites), 1))
    fit = len(suites)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 2**20
        fit = int(0.9 * free / (CONTEXT_MIB + max(cost(suite)[1] for suite in suites)))
    return max(1, min(fit, len(suites), cores()))


def cores() -> int:
    """Cores that this process may use, by affinity and by the container's share."""
    return int(joblib.cpu_count())


Results = Generator[tuple[int, TaskResult], None, None]


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """One thread for torch and BLAS, whose sums depend on it; ``threads`` for compiled loops, whose numbers do not."""
    before = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def _numbered(number: int, task: Task) -> tuple[int, TaskResult]:
    return number, run_task(task)


def _local(pending: Sequence[int], tasks: Sequence[Task], workers: int, scheduler: str) -> Results:
    suites, device = [tasks[number].suite for number in pending], torch.device(tasks[0].device)
    workers = workers_for(workers, suites, device)
    if workers == 1:
        ran = []
        for number in pending:
            result = run_task(tasks[number])
            ran += [tasks[number]] if result.fresh and tasks[number].draw else []
            yield number, result
        for task in ran:
            _draw(task, slice(None))
        return
    others = set(multiprocessing.active_children())
    start_server(suites)
    pool, drawings = ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"), _begin_worker), []
    try:
        futures = [pool.submit(_numbered, number, tasks[number]) for number in pending]
        for future in as_completed(futures):
            number, result = future.result()
            if result.fresh and tasks[number].draw:
                shares = (slice(first, None, workers) for first in range(workers))
                drawings += [pool.submit(_draw, tasks[number], share) for share in shares]
            yield number, result
        wait(drawings)  # what could not be drawn here the report draws, and says why it cannot
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()  # what it is writing it writes to the end
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(task: Task, share: slice) -> None:
    """A share of the report's figures of a run that is done."""
    from validation.report import draw_figures

    draw_figures(load(Path(task.root) / task.name), share)


def _begin_worker() -> None:
    """In a worker: leave SIGINT to the process that started it, and end when that has ended, however it went."""
    gc.freeze()  # what was imported stays: collections would walk through it again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _dask(pending: Sequence[int], tasks: Sequence[Task], workers: int, scheduler: str) -> Results:
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        raise SettingsError("dask is not installed: pip install 'valleydrift[dask]' for --engine dask.") from None
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if not scheduler:
            own = LocalCluster(n_workers=workers or None, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(own)
        stack.enter_context(Client(address))
        with joblib.parallel_config(backend="dask", n_jobs=-1):
            parallel = joblib.Parallel(return_as="generator_unordered")
            yield from parallel(joblib.delayed(_numbered)(number, tasks[number]) for number in pending)


def _slurm(pending: Sequence[int], tasks: Sequence[Task], workers: int, scheduler: str) -> Results:
    """submitit: Slurm where ``srun`` is, else its local engine; at most ``workers`` jobs at once."""
    try:
        import submitit
    except ImportError:
        raise SettingsError("submitit is not installed: pip install 'valleydrift[slurm]' for --engine slurm.") from None
    executor = submitit.AutoExecutor(folder=Path(tasks[0].root) / "submitit")
    executor.update_parameters(timeout_min=24 * 60, slurm_array_parallelism=workers or 1000, cpus_per_task=1)
    with executor.batch():
        jobs = {number: executor.submit(run_task, tasks[number]) for number in pending}
    while jobs:
        finished = [number for number, job in jobs.items() if job.done()]
        for number in finished:
            job = jobs.pop(number)
            try:
                yield number, job.result()
            except Exception as fault:  # the job died: submitit says how
                yield number, TaskResult(tasks[number].name, False, " ".join(str(fault).split())[:500])
        if jobs and not finished:
            time.sleep(0.2)
