"""The cards that the stand-in can be: figures of the vendor's data sheets and of its tables of compute capabilities."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Card:
    """shared_per_block: bytes that a block may opt in to. driver: the oldest that its architecture needs for CUDA 13."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2: int
    memory: int
    driver: str = "580.65.06"
    registers_per_multiprocessor: int = 65536

    @property
    def limits(self) -> tuple[int, ...]:
        """Return `DeviceLimits` (res2net_fused/_native/library.py) without its last, as the CUDA library asks the device."""
        return (*self.capability, self.multiprocessors, self.shared_per_block, self.shared_per_multiprocessor,
                self.registers_per_multiprocessor, self.l2)  # fmt: skip


_LARGE = 163 * KIB, 164 * KIB, 2048  # shared memory of a block and a multiprocessor, threads: sm_80
_SMALL = 99 * KIB, 100 * KIB, 1536  # sm_86, sm_89, sm_120
_HOPPER = 227 * KIB, 228 * KIB, 2048  # sm_90, sm_100
CARDS = {
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, *_LARGE, 40 * MIB, 80 * GIB),
    "RTX3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, *_SMALL, 6 * MIB, 24 * GIB),
    "RTX4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, *_SMALL, 72 * MIB, 24 * GIB),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, *_HOPPER, 50 * MIB, 80 * GIB),
    "H200": Card("NVIDIA H200", (9, 0), 132, *_HOPPER, 50 * MIB, 141 * GIB),
    "B200": Card("NVIDIA B200", (10, 0), 148, *_HOPPER, 126 * MIB, 180 * GIB),
    "RTX5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, *_SMALL, 96 * MIB, 32 * GIB),
}
