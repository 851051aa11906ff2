"""Independent jobs in this process, or on Ray workers of this and other machines."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from text2weight_training.files import TrainingDataError

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")

_ANSWERS_WITHIN_S = 10.0  # a cluster's first machine
_QUIET = {"logging_level": "ERROR", "log_to_driver": False}


def run_jobs(
    work: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    """Do every job and yield each with its result as soon as it is there, in any order.

    With one worker everything happens in this process, and Ray is not imported. With more, Ray starts as many
    processes on this machine, or uses the cluster that the environment variable RAY_ADDRESS names. They need this
    package; `shared` is sent to each machine once, and results come back here, so no shared folder is needed. Every
    worker computes with as many threads as this process would, since sums in another order have other last bits.

    Args:
        work: a function of a module, of what all jobs share and one job; on CPU tensors.
        shared: sent to every worker.
        jobs: what is to be done.
        workers: jobs at a time.

    Raises:
        TrainingDataError: Ray is not installed, no cluster answers at RAY_ADDRESS or none of its machines has enough
            cores for a worker, a worker dies again and again, or a job raises it.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(shared, job)
    elif jobs:
        yield from _run_on_ray(work, shared, jobs, workers)


def _run_on_ray(
    work: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Result]]:
    try:
        import ray
    except ImportError as error:
        raise TrainingDataError(
            f"{workers} workers need Ray: install text2weight[distributed], or work with one"
        ) from error
    threads = torch.get_num_threads()
    try:
        _start(ray, workers, threads)
        task: Any = ray.remote(_on_worker).options(num_cpus=threads, max_retries=3)
        sent = ray.put((work, shared))
        waiting = list(reversed(jobs))
        running: dict[Any, Job] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                running[task.remote(sent, job, threads)] = job
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            yield job, _result(ray, done)
    finally:
        ray.shutdown()


def _start(ray: Any, workers: int, threads: int) -> None:
    if "RAY_ADDRESS" in os.environ:
        _join_cluster(ray, os.environ["RAY_ADDRESS"], threads)
        return
    cores = os.cpu_count() or 1
    if workers * threads > max(cores, workers):
        warnings.warn(
            f"{workers} workers of {threads} threads each share {cores} cores: set OMP_NUM_THREADS to "
            f"{max(1, cores // workers)} to be faster",
            stacklevel=2,
        )
    ray.init(num_cpus=workers * threads, num_gpus=0, include_dashboard=False, **_QUIET)


def _join_cluster(ray: Any, address: str, threads: int) -> None:
    host, _, port = address.rpartition(":")
    try:
        # Ray itself would try for minutes. Other addresses, "auto" and those of its client, fail at once.
        if host and port.isdigit() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN_S).close()
        ray.init(address=address, **_QUIET)
    except (OSError, ValueError) as error:
        raise TrainingDataError(
            f"no Ray cluster answers at RAY_ADDRESS {address!r} ({error}): start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it asks for a token, or unset RAY_ADDRESS to work on this machine alone"
        ) from error
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if most < threads:  # Ray would wait for such a machine for ever
        raise TrainingDataError(
            f"a worker takes {threads} cores, and no machine of the Ray cluster {address} has more than {most}: set "
            f"OMP_NUM_THREADS to at most {most}"
        )


def _on_worker(sent: tuple[Callable[[Shared, Job], Result], Shared], job: Job, threads: int) -> Result:
    torch.set_num_threads(threads)
    work, shared = sent
    return work(shared, job)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TrainingDataError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0]
        raise TrainingDataError(
            f"a Ray worker was lost ({reason}): what is finished stays, run the command again, with fewer workers if "
            "memory is short"
        ) from error
