"""One case of a result file: a chain, block or network, and the candidates that are timed on it in turn."""

from __future__ import annotations

from dataclasses import dataclass

from ..testing.cases import TRAINED, WidthScale

BASELINE = WidthScale(64, 1)  # the ResNet-50 of the same FLOPs
TARGET_CONFIGS = (WidthScale(26, 4), WidthScale(14, 8))  # that a record's targets are about

Candidate = tuple[str, bool]  # a provider, and whether its calls are replayed from a CUDA graph


@dataclass(frozen=True)
class TimedCase:
    """One case whose candidates are timed in turn, so that their ratios come from one run.

    stage: None for a network, which a record times beside the ResNet-50 of the same candidates.
    """

    workload: str
    config: WidthScale
    stage: int | None
    variant: str
    batch: int
    dtype: str
    candidates: tuple[Candidate, ...]

    @property
    def part(self) -> str:
        """What `--part` of a record calls it."""
        return "train_step" if self.workload in TRAINED else self.workload

    @property
    def config_name(self) -> str:
        return str(self.config) if self.stage is not None else network_name(self.config)

    def keys(self, device: str) -> list[tuple[object, ...]]:
        """The keys of its rows in a record: see `record_file.row_key`."""
        case = (self.workload, self.config_name, self.stage, self.variant, self.batch, self.dtype, device)
        return [(*case, name, graph) for name, graph in self.candidates]

    def __str__(self) -> str:
        where = "" if self.stage is None else f" stage {self.stage}" + ("" if self.variant == "normal" else f" {self.variant}")
        return f"{self.workload} {self.config_name}{where} batch {self.batch} {self.dtype}"


def network_name(config: WidthScale) -> str:
    return "resnet50" if config == BASELINE else f"res2net50_{config}"
