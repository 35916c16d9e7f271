"""Triton's kernels of the GPU tests, compiled before the tests that launch them, all processors at once.

They land in Triton's cache folder under the very keys that a launch looks up: tests/test_gpu_coverage.py tries it.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import time

SECONDS = 1.5  # of a processor for one kernel: at most, of those measured ahead of time

_calls: list[object] = []


def arithmetic(kernels: int, processes: int) -> str:
    return f"{kernels} kernels x {SECONDS} s / {processes} processes = about {kernels * SECONDS / processes:.0f} s"


def compile_all(capability: tuple[int, int], processes: int | None = None) -> tuple[int, list[str]]:
    """Compiles what `gpu_cases` launches on such a card; returns how many kernels that are, and what failed."""
    processes = processes or os.cpu_count() or 1
    _prepare(capability)
    count = len(_calls)
    print(f"\ncompiling Triton kernels: {arithmetic(count, processes)}", flush=True)
    start, failures = time.monotonic(), []
    context = multiprocessing.get_context("spawn")  # a CUDA context survives no fork
    with concurrent.futures.ProcessPoolExecutor(processes, context, _prepare, (capability,)) as pool:
        jobs = {pool.submit(_compile, i, capability): i for i in range(count)}
        for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            if job.exception() is not None:
                failures.append(f"kernel {jobs[job]}: {job.exception()!r:.300}")
            if done % 50 == 0 or done == count:
                print(f"compiled {done} of {count} ({time.monotonic() - start:.0f} s)", flush=True)
    return count, failures


def _prepare(capability: tuple[int, int]) -> None:
    """In every process, since a launch cannot be sent to another."""
    import gpu_cases

    _calls[:] = gpu_cases.kernel_calls([*gpu_cases.INFERENCE, *gpu_cases.TRAINING], capability)


def _compile(index: int, capability: tuple[int, int]) -> None:
    from test_triton_aot import compile_for

    compile_for(_calls[index], capability)
