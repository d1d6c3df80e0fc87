"""Processes that share the pieces of a study, one thread each; a single one works in this process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from fastdiffclip.errors import ResourceError
from fastdiffclip.runtime import Progress, set_threads
from fastdiffclip.study.job import Job, Piece, Pretraining
from fastdiffclip.study.workshop import Done, Workshop

Task = Pretraining | Piece
Work = Callable[[Sequence[Task]], Iterator[tuple[Task, Done]]]
PATIENCE = 10.0  # seconds that a stopped worker has to end

_workshop: Workshop | None = None  # of a worker process


def count_jobs(wanted: int, device: str) -> int:
    """Number of worker processes: ``wanted``, or with 0 one per core that this process may use, on a GPU one."""
    import torch

    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return wanted or (1 if on_gpu else len(os.sched_getaffinity(0)))


@contextmanager
def crew(job: Job, jobs: int, progress: Progress) -> Iterator[Work]:
    """Yield what does tasks, in any order of completion; results do not depend on the number of processes.

    Raises:
        ResourceError: while it works, a process was killed, as the system does when memory runs out.
    """
    if jobs == 1:
        with _one_thread():
            workshop = Workshop(job)
            yield lambda tasks: ((task, workshop.do(task, progress)) for task in tasks)
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (job,))
    try:
        yield lambda tasks: _share(pool, tasks)
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        _end([child for child in multiprocessing.active_children() if child not in others])
        raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread in torch and in the linear algebra of numpy, as workers have, so that figures are theirs."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _start(job: Job) -> None:
    """A worker begins."""
    global _workshop
    from threadpoolctl import threadpool_limits

    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    set_threads(1)
    threadpool_limits(1)
    _workshop = Workshop(job)


def _do(task: Task) -> Done:
    assert _workshop is not None
    return _workshop.do(task)


def _share(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> Iterator[tuple[Task, Done]]:
    with _deaf_to_interrupts():
        waiting: dict[Future[Done], Task] = {pool.submit(_do, task): task for task in tasks}
    while waiting:
        finished, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in finished:
            try:
                yield waiting.pop(future), future.result()
            except BrokenProcessPool:
                raise ResourceError(
                    "a worker process was killed, most likely for want of memory; go on with --resume and fewer --jobs"
                ) from None


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which a terminal sends to all: this process ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(PATIENCE)
        if worker.is_alive():
            worker.kill()
            worker.join()
