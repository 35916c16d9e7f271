"""What a record measures, in which order, and what still fits into its time. Pure Python: nothing here needs a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from res2net_fused.bench.timed_case import BASELINE, TARGET_CONFIGS, Candidate, TimedCase
from res2net_fused.testing.cases import STAGES, TRAINED, VARIANTS, WidthScale

PARTS = ("chain", "block", "network", "train_step")
_W48, _W26S8 = WidthScale(48, 2), WidthScale(26, 8)

_GRAPHED: tuple[Candidate, ...] = (
    ("ours_graph", True),
    ("compile_max_autotune", True),
    ("compile", True),
    ("eager_channels_last", True),
    ("triton", True),
    ("cuda", True),
)
# Peers that fold BatchNorms, of which a chain has none.
_FOLDING: tuple[Candidate, ...] = (("compile_freezing", True), ("tensorrt", True))
_LAUNCHED: tuple[Candidate, ...] = (("ours", False), ("compile", False), ("eager_channels_last", False), ("eager", False))
_ON_CPU: tuple[Candidate, ...] = (
    *_LAUNCHED,
    ("compile_freezing", False),
    ("onnxruntime", False),
    ("openvino", False),
)
_NETWORK: tuple[Candidate, ...] = (
    ("ours_graph", True),
    ("compile", True),
    *_FOLDING,
    ("eager_channels_last", True),
    *_LAUNCHED,
)
_TRAIN: tuple[Candidate, ...] = _LAUNCHED
_TRAIN_CUDA: tuple[Candidate, ...] = (*_TRAIN, ("triton", False))  # ours asked for, since auto takes only what is measured
_TRAIN_CPU: tuple[Candidate, ...] = (*_TRAIN, ("cpu", False))
_MAX_AUTOTUNE: tuple[Candidate, ...] = (("compile_max_autotune", True),)
_JAX: tuple[Candidate, ...] = (("jax", False),)


def schedule(kind: str, parts: Sequence[str] = PARTS, quick: bool = False) -> list[TimedCase]:
    """Every case of these parts on a "cuda" or "cpu" device, what matters most first."""
    phases = _quick_phases() if quick else _cuda_phases() if kind == "cuda" else _cpu_phases()
    return list(dict.fromkeys(case for phase in phases for case in phase if case.part in parts))


def _stages(
    workload: str,
    configs: Iterable[WidthScale],
    batch: int,
    dtype: str,
    candidates: tuple[Candidate, ...] | None = None,
    variants: Sequence[str] = ("normal",),
    stages: Sequence[int] = STAGES,
) -> list[TimedCase]:
    if candidates is None:
        candidates = (*_GRAPHED, *(_FOLDING if workload == "block" else ()), *_LAUNCHED)
    return [
        TimedCase(workload, config, stage, variant, batch, dtype, candidates)
        for config in configs
        for variant in variants
        for stage in stages
    ]


def _networks(
    configs: Iterable[WidthScale], batch: int, dtype: str,
    candidates: tuple[Candidate, ...] = _NETWORK, workload: str = "network",
) -> list[TimedCase]:  # fmt: skip
    return [TimedCase(workload, config, None, "normal", batch, dtype, candidates) for config in configs]


def _cuda_phases() -> Iterator[list[TimedCase]]:
    half, bf16 = "float16", "bfloat16"
    # What the targets need.
    yield _stages("chain", TARGET_CONFIGS, 32, bf16)
    yield _stages("chain", [_W48], 32, bf16)
    yield _stages("block", TARGET_CONFIGS[:1], 32, bf16, variants=VARIANTS)
    yield _networks(TARGET_CONFIGS, 32, bf16)
    yield _stages("block", TARGET_CONFIGS[:1], 256, bf16, variants=VARIANTS)
    yield _stages("block", [_W48], 32, bf16)
    # The other batches, then what else is published.
    for batch in (256, 1):
        yield _stages("chain", (*TARGET_CONFIGS, _W48), batch, bf16)
    for batch in (32, 256, 1):
        yield _stages("block", (*TARGET_CONFIGS, _W48), batch, bf16)
    for batch in (256, 1):
        yield _networks(TARGET_CONFIGS, batch, bf16)
    for batch in (32, 256, 1):
        yield _networks((_W48, _W26S8), batch, bf16)
    for batch in (32, 256, 1):
        for workload in ("chain", "block"):
            yield _stages(workload, (_W26S8, BASELINE), batch, bf16)
    for batch in (32, 256, 1):
        for workload in ("chain", "block"):
            yield _stages(workload, (*TARGET_CONFIGS, _W48, _W26S8, BASELINE), batch, half)
        yield _networks((*TARGET_CONFIGS, _W48, _W26S8), batch, half)
    # Minutes each, for rows that no target needs.
    yield _networks(TARGET_CONFIGS, 32, bf16, _MAX_AUTOTUNE)
    for batch in (128, 256):
        yield _networks(TARGET_CONFIGS, batch, bf16, _TRAIN_CUDA, "train_step")
    for batch in (128, 256):
        for workload in TRAINED:
            yield _stages(workload, TARGET_CONFIGS, batch, bf16, _TRAIN_CUDA)
    for workload in ("chain", "block"):
        yield _stages(workload, (*TARGET_CONFIGS, _W48, BASELINE), 32, bf16, _JAX)
    yield _networks((*TARGET_CONFIGS, BASELINE), 32, bf16, _JAX)


def _cpu_phases() -> Iterator[list[TimedCase]]:
    configs = (*TARGET_CONFIGS, _W48, BASELINE)
    for batch in (8, 1):
        for workload in ("chain", "block"):
            yield _stages(workload, configs, batch, "float32", _ON_CPU)
    for batch in (8, 1):
        yield _networks(TARGET_CONFIGS, batch, "float32", _ON_CPU)
    for workload in TRAINED:
        yield _stages(workload, configs[:3], 8, "float32", _TRAIN_CPU)
    yield _networks(TARGET_CONFIGS, 8, "float32", _TRAIN_CPU, "train_step")


def _quick_phases() -> Iterator[list[TimedCase]]:
    """One of each kind, with nothing that compiles, to try the machinery."""
    config, candidates = TARGET_CONFIGS[:1], (("ours", False), ("eager_channels_last", False))
    yield _stages("chain", config, 1, "float32", candidates, stages=(3, 4))
    yield _stages("block", config, 1, "float32", candidates, VARIANTS, stages=(4,))
    yield _networks(config, 1, "float32", candidates)
    for workload in TRAINED:
        yield _stages(workload, config, 1, "float32", candidates, stages=(4,))
    yield _networks(config, 1, "float32", candidates, "train_step")


class Budget:
    """Time that is left, and whether a case is expected to fit into it."""

    # Seconds for the first case of a kind on a GPU, compiling included; later ones are judged by those before.
    _FIRST = {
        "chain": 30.0, "block": 45.0, "network": 120.0, "train_chain": 45.0, "train_block": 60.0, "train_step": 60.0,
        "jax": 40.0,
    }  # fmt: skip

    def __init__(self, minutes: float, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        """started: of the whole command, as the clock showed it."""
        self._clock, self._started, self._end = clock, started, started + 60 * minutes
        self._seen: dict[str, list[float]] = {}

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started

    @property
    def left(self) -> float:
        return self._end - self._clock()

    def expected(self, kind: str) -> float:
        """Seconds for one more case: a quarter more than the mean of the last three."""
        seen = self._seen.get(kind, [])[-3:]
        return 1.25 * sum(seen) / len(seen) if seen else self._FIRST[kind]

    def fits(self, kind: str) -> bool:
        return self.expected(kind) <= self.left

    def note(self, kind: str, seconds: float) -> None:
        self._seen.setdefault(kind, []).append(seconds)
