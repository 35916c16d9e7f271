"""What a record measures, in which order, and what still fits into its time. Pure Python: nothing here needs a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..testing.cases import STAGES, TRAINED, VARIANTS, Config

PARTS = ("chain", "block", "network", "train_step")
YARDSTICK = Config(64, 1)  # the ResNet-50 of the same FLOPs
FIGURE_CONFIGS = (Config(26, 4), Config(14, 8))
_W48, _W26S8 = Config(48, 2), Config(26, 8)

Contestant = tuple[str, bool]  # a provider, and whether its calls are replayed from a CUDA graph

_GRAPHED: tuple[Contestant, ...] = (
    ("ours_graph", True),
    ("compile_max_autotune", True),
    ("compile", True),
    ("eager_channels_last", True),
    ("triton", True),
    ("cuda", True),
)
# Peers that fold BatchNorms, of which a chain has none.
_FOLDING: tuple[Contestant, ...] = (("compile_freezing", True), ("tensorrt", True))
_LAUNCHED: tuple[Contestant, ...] = (("ours", False), ("compile", False), ("eager_channels_last", False), ("eager", False))
_ON_CPU: tuple[Contestant, ...] = (
    *_LAUNCHED,
    ("compile_freezing", False),
    ("onnxruntime", False),
    ("openvino", False),
)
_NETWORK: tuple[Contestant, ...] = (
    ("ours_graph", True),
    ("compile", True),
    *_FOLDING,
    ("eager_channels_last", True),
    *_LAUNCHED,
)
_TRAIN: tuple[Contestant, ...] = _LAUNCHED
_TRAIN_CUDA: tuple[Contestant, ...] = (*_TRAIN, ("triton", False))  # ours asked for, since auto takes only what is measured
_TRAIN_CPU: tuple[Contestant, ...] = (*_TRAIN, ("cpu", False))
_MAX_AUTOTUNE: tuple[Contestant, ...] = (("compile_max_autotune", True),)
_JAX: tuple[Contestant, ...] = (("jax", False),)


@dataclass(frozen=True)
class Unit:
    """One case whose contestants are timed in turn, so that their ratios come from one run.

    stage: None for a network, which is timed beside the ResNet-50 of the same contestants.
    """

    workload: str
    config: Config
    stage: int | None
    variant: str
    batch: int
    dtype: str
    contestants: tuple[Contestant, ...]

    @property
    def part(self) -> str:
        """Of PARTS."""
        return "train_step" if self.workload in TRAINED else self.workload

    @property
    def config_name(self) -> str:
        return str(self.config) if self.stage is not None else network_name(self.config)

    def keys(self, device: str) -> list[tuple[object, ...]]:
        """Of its rows in a record: see `record_file.row_key`."""
        case = (self.workload, self.config_name, self.stage, self.variant, self.batch, self.dtype, device)
        return [(*case, name, graph) for name, graph in self.contestants]

    def __str__(self) -> str:
        where = "" if self.stage is None else f" stage {self.stage}" + ("" if self.variant == "normal" else f" {self.variant}")
        return f"{self.workload} {self.config_name}{where} batch {self.batch} {self.dtype}"


def network_name(config: Config) -> str:
    return "resnet50" if config == YARDSTICK else f"res2net50_{config}"


def schedule(kind: str, parts: Sequence[str] = PARTS, quick: bool = False) -> list[Unit]:
    """Every unit of these parts on a "cuda" or "cpu" device, what matters most first."""
    phases = _quick_phases() if quick else _cuda_phases() if kind == "cuda" else _cpu_phases()
    return list(dict.fromkeys(unit for phase in phases for unit in phase if unit.part in parts))


def _stages(
    workload: str,
    configs: Iterable[Config],
    batch: int,
    dtype: str,
    contestants: tuple[Contestant, ...] | None = None,
    variants: Sequence[str] = ("normal",),
    stages: Sequence[int] = STAGES,
) -> list[Unit]:
    if contestants is None:
        contestants = (*_GRAPHED, *(_FOLDING if workload == "block" else ()), *_LAUNCHED)
    return [
        Unit(workload, config, stage, variant, batch, dtype, contestants)
        for config in configs
        for variant in variants
        for stage in stages
    ]


def _networks(
    configs: Iterable[Config], batch: int, dtype: str, contestants: tuple[Contestant, ...] = _NETWORK, workload: str = "network"
) -> list[Unit]:
    return [Unit(workload, config, None, "normal", batch, dtype, contestants) for config in configs]


def _cuda_phases() -> Iterator[list[Unit]]:
    half, bf16 = "float16", "bfloat16"
    # The figures that the record is made for.
    yield _stages("chain", FIGURE_CONFIGS, 32, bf16)
    yield _stages("chain", [_W48], 32, bf16)
    yield _stages("block", FIGURE_CONFIGS[:1], 32, bf16, variants=VARIANTS)
    yield _networks(FIGURE_CONFIGS, 32, bf16)
    yield _stages("block", FIGURE_CONFIGS[:1], 256, bf16, variants=VARIANTS)
    yield _stages("block", [_W48], 32, bf16)
    # The other batches, then what else is published.
    for batch in (256, 1):
        yield _stages("chain", (*FIGURE_CONFIGS, _W48), batch, bf16)
    for batch in (32, 256, 1):
        yield _stages("block", (*FIGURE_CONFIGS, _W48), batch, bf16)
    for batch in (256, 1):
        yield _networks(FIGURE_CONFIGS, batch, bf16)
    for batch in (32, 256, 1):
        yield _networks((_W48, _W26S8), batch, bf16)
    for batch in (32, 256, 1):
        for workload in ("chain", "block"):
            yield _stages(workload, (_W26S8, YARDSTICK), batch, bf16)
    for batch in (32, 256, 1):
        for workload in ("chain", "block"):
            yield _stages(workload, (*FIGURE_CONFIGS, _W48, _W26S8, YARDSTICK), batch, half)
        yield _networks((*FIGURE_CONFIGS, _W48, _W26S8), batch, half)
    # Minutes each, for rows that no figure needs.
    yield _networks(FIGURE_CONFIGS, 32, bf16, _MAX_AUTOTUNE)
    for batch in (128, 256):
        yield _networks(FIGURE_CONFIGS, batch, bf16, _TRAIN_CUDA, "train_step")
    for batch in (128, 256):
        for workload in TRAINED:
            yield _stages(workload, FIGURE_CONFIGS, batch, bf16, _TRAIN_CUDA)
    for workload in ("chain", "block"):
        yield _stages(workload, (*FIGURE_CONFIGS, _W48, YARDSTICK), 32, bf16, _JAX)
    yield _networks((*FIGURE_CONFIGS, YARDSTICK), 32, bf16, _JAX)


def _cpu_phases() -> Iterator[list[Unit]]:
    configs = (*FIGURE_CONFIGS, _W48, YARDSTICK)
    for batch in (8, 1):
        for workload in ("chain", "block"):
            yield _stages(workload, configs, batch, "float32", _ON_CPU)
    for batch in (8, 1):
        yield _networks(FIGURE_CONFIGS, batch, "float32", _ON_CPU)
    for workload in TRAINED:
        yield _stages(workload, configs[:3], 8, "float32", _TRAIN_CPU)
    yield _networks(FIGURE_CONFIGS, 8, "float32", _TRAIN_CPU, "train_step")


def _quick_phases() -> Iterator[list[Unit]]:
    """One of each kind, with nothing that compiles, to try the machinery."""
    config, contestants = FIGURE_CONFIGS[:1], (("ours", False), ("eager_channels_last", False))
    yield _stages("chain", config, 1, "float32", contestants, stages=(3, 4))
    yield _stages("block", config, 1, "float32", contestants, VARIANTS, stages=(4,))
    yield _networks(config, 1, "float32", contestants)
    for workload in TRAINED:
        yield _stages(workload, config, 1, "float32", contestants, stages=(4,))
    yield _networks(config, 1, "float32", contestants, "train_step")


class Budget:
    """Time that is left, and whether a unit is expected to fit into it."""

    # Seconds for the first unit of a kind on a GPU, compiling included; later ones are judged by those before.
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
        """Seconds for one more unit: a quarter more than the mean of the last three."""
        seen = self._seen.get(kind, [])[-3:]
        return 1.25 * sum(seen) / len(seen) if seen else self._FIRST[kind]

    def fits(self, kind: str) -> bool:
        return self.expected(kind) <= self.left

    def note(self, kind: str, seconds: float) -> None:
        self._seen.setdefault(kind, []).append(seconds)
