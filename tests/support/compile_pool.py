"""Triton's kernels of the GPU tests, compiled before the tests that launch them, all processors at once.

They land in Triton's cache folder under the very keys that a launch looks up: tests/integration/test_gpu_coverage.py tries it.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_KERNELS = 740  # on any card, counted by the same file
SECONDS = 1.5  # of a processor for one kernel, the largest among them included


class Task(NamedTuple):
    """One kernel to compile, as another process can be told: a `triton.compiler.ASTSource` and its options."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


def arithmetic(kernels: int, processes: int) -> str:
    return f"{kernels} kernels x {SECONDS} s / {processes} processes = {kernels * SECONDS / processes:.0f} s"


def task_of(call: Any) -> Task:
    from triton_calls import source

    s = source(call)
    return Task(s.fn.__module__, s.fn.__name__, s.signature, s.constants, s.attrs, dict(call.options))


def compile_all(calls: Sequence[object], capability: tuple[int, int], processes: int | None = None) -> list[str]:
    """Compiles the kernels of these `KernelCall`s for such a card; returns what failed."""
    processes = max(1, min(processes or len(os.sched_getaffinity(0)), len(calls)))
    print(f"\ncompiling {len(calls)} Triton kernels in {processes} processes", flush=True)
    start, failures = time.monotonic(), []
    context = multiprocessing.get_context("spawn")  # a CUDA context survives no fork
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        jobs = {pool.submit(compile_task, task_of(call), capability): call for call in calls}
        for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            if job.exception() is not None:
                failures.append(f"{jobs[job].kernel.__name__}: {job.exception()!r:.300}")
            if done % 50 == 0 or done == len(calls):
                print(f"compiled {done} of {len(calls)} ({time.monotonic() - start:.0f} s)", flush=True)
    return failures


def compile_task(task: Task, capability: tuple[int, int]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(task.module), task.kernel)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    triton.compile(ASTSource(kernel, task.signature, task.constants, task.attributes), target=target, options=task.options)
