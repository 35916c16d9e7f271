"""Timing: interleaved repeats on a CPU or one CUDA device, medians and percentiles, and peak memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)  # of a contender

_SPINNING_S = 0.01  # GCC's OpenMP threads spin for about half of this
_LONG_MS = 50.0  # of a run beside which waking threads weighs nothing


def use_device(device: str) -> None:
    """Streams, events, captures and launches are those of the current device: to be called before anything else runs on it."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)


def _on(device: str | torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Timing:
    """What one contender took: milliseconds per call, from how many runs, and MB that one call allocates at its peak."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_mb: float

    @classmethod
    def of_samples(cls, samples: list[float], peak: float) -> Timing:
        """samples: milliseconds per call of each run."""
        low, high = min(samples), max(samples)
        if len(samples) > 1:
            low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), low, high, len(samples), peak)

    def row(self, **case: object) -> dict[str, Any]:
        """The row of a result file: what was timed, and these figures."""
        return case | dataclasses.asdict(self)


class Contender:
    """A model that is called with each of its inputs in turn, in inference mode."""

    calls = 1  # calls of the model in one run

    def __init__(self, model: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self._next = itertools.cycle(inputs)

    def run(self) -> Any:
        with torch.inference_mode():
            return self.model(next(self._next))

    def outputs(self) -> list[Tensor]:
        """What a run computes for each input, as it is timed."""
        with torch.inference_mode():
            return [self.model(x) for x in self.inputs]


class GraphedContender(Contender):
    """A CUDA graph of calls for each input in turn, replayed as a whole: no time of the host is in it.

    min_calls: of the model in one graph, so that the start of a replay weighs little.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], min_calls: int = 1) -> None:
        super().__init__(model, inputs)
        rounds = -(-min_calls // len(inputs))
        self.calls = rounds * len(inputs)
        self._device = inputs[0].device
        with _on(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # compiles, tunes and packs outside the capture
                    super().run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # PyTorch leaves the capture's stream the current one where a capture fails: whoever comes next would run on it.
            own = torch.cuda.stream(torch.cuda.current_stream())
            with own, torch.inference_mode(), torch.cuda.graph(self._graph, stream=stream):
                for _ in range(rounds):
                    # Kept, so that each call writes memory of its own, which the L2 does not hold yet.
                    self._outputs = [self.model(x) for x in inputs]

    def run(self) -> Any:
        self._graph.replay()
        return None

    def outputs(self) -> list[Tensor]:
        """What a replay writes for each input, into memory that holds NaN before."""
        with torch.inference_mode():
            for out in self._outputs:
                out.fill_(float("nan"))
        self._graph.replay()
        torch.cuda.synchronize(self._device)
        return list(self._outputs)


def measure(
    contenders: Mapping[Name, Contender],
    device: str,
    *,
    seconds: float,
    min_repeats: int = 5,
    max_repeats: int = 200,
    warm_up: int = 2,
    peaks: bool = True,
    advance: Callable[[], object] = lambda: None,
) -> dict[Name, Timing]:
    """Times all contenders in turn, round after round, so that drifts of the machine meet all of them alike.

    Each is taken from `contenders` just before it runs, so that a Mapping knows who does. What one raises is raised.
    Where a model computes in threads that are not PyTorch's (its attribute `own_threads`), every run starts when the threads
    of the one before have gone to sleep.
    seconds: for all contenders together, after warm-up; at least `min_repeats` rounds are run, at most `max_repeats`.
    peaks: whether memory is measured too, else 0.
    advance: called after every round.
    """
    with _on(device):
        memory = {name: peak_mb(contender, device) if peaks else 0.0 for name, contender in contenders.items()}
        for contender in contenders.values():
            for _ in range(warm_up):
                contender.run()
        once = _cuda_ms if torch.device(device).type == "cuda" else _wall_ms
        if any(getattr(contender.model, "own_threads", False) for contender in contenders.values()):
            once = _settled_ms
        samples: dict[Name, list[float]] = {name: [] for name in contenders}
        names, order = list(contenders), random.Random(0)
        start = time.perf_counter()
        for repeat in range(max_repeats):
            if repeat >= min_repeats and time.perf_counter() - start > seconds:
                break
            order.shuffle(names)  # nobody always follows the same neighbour's cache contents
            for name in names:
                samples[name].append(once(contenders[name]))
            advance()
    return {name: Timing.of_samples(values, memory[name]) for name, values in samples.items()}


def _wall_ms(contender: Contender) -> float:
    start = time.perf_counter()
    contender.run()
    return (time.perf_counter() - start) * 1e3 / contender.calls


def _settled_ms(contender: Contender) -> float:
    """Wall time out of the way of other contenders' threads, which spin for milliseconds before they sleep.

    The contender's own threads sleep by then, too: a short run is timed after one that wakes them.
    """
    time.sleep(_SPINNING_S)
    first = _wall_ms(contender)
    return first if first > _LONG_MS else _wall_ms(contender)


def _cuda_ms(contender: Contender) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    contender.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / contender.calls


def peak_mb(contender: Contender, device: str) -> float:
    """MB (10^6 bytes) of tensors that one call holds at once beyond its input and weights, after a first call."""
    with torch.inference_mode():
        contender.model(contender.inputs[0])  # compiles and packs
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode():
            contender.model(contender.inputs[0])
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return _cpu_peak_mb(contender)


def _cpu_peak_mb(contender: Contender) -> float:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise writes lines of its own to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.inference_mode():
        contender.model(contender.inputs[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate((e["args"]["Bytes"] for e in events), initial=0)) / 1e6
