"""What `tune` found out, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .._tables import format_table

IN_CHANNELS_LAST = "in channels-last"


class Settled(Exception):
    """Why something is not measured now: it ended an earlier process, or another process measures."""


@dataclass(frozen=True)
class TunedCall:
    """One kind of call that blocks of the model had.

    blocks: their names. call: what is computed, on which sizes. choice: what is taken from now on, "" where nothing could be
    measured. ms: milliseconds of each choice whose results were right; "own" is the block's own forward. errors: against
    float64, in the norm. notes: what was put aside, and why; whether an earlier measurement is taken.
    """

    blocks: tuple[str, ...]
    call: str
    choice: str = ""
    ms: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TuneReport:
    """What `tune` returns.

    calls: one entry for each kind of call. model_ms: milliseconds of the whole model, by "own", "predicted" and "tuned", and by
    IN_CHANNELS_LAST if its blocks meet NCHW. notes: of blocks that were left out, and why.
    """

    calls: tuple[TunedCall, ...] = ()
    model_ms: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = []
        for call in self.calls:
            times = ", ".join(
                f"{name} {ms:.3g} ({call.errors.get(name, 0.0):.1g})"
                for name, ms in sorted(call.ms.items(), key=lambda i: i[1])
            )
            first, *others = call.blocks or ("",)
            blocks = (first or "(model)") + (f" and {len(others)} more" if others else "")
            rows.append((blocks, call.call, call.choice or "as predicted", times, "; ".join(call.notes)))
        head = ("block", "call", "taken", "ms (error)", "notes")
        lines = [format_table(head, rows, left=len(head))] if rows else []
        if self.model_ms:
            own, predicted, tuned = (self.model_ms[name] for name in ("own", "predicted", "tuned"))
            lines.append(
                f"model, ms: its own forwards {own:.4g}, predicted {predicted:.4g}, tuned {tuned:.4g}: "
                f"{own / tuned:.2f} times as fast as its own, {predicted / tuned:.2f} times as predicted"
            )
            converted = self.model_ms.get(IN_CHANNELS_LAST)
            if converted is not None:
                line = "; accelerate(model, memory_format=torch.channels_last) converts it" if converted < tuned else ""
                lines.append(f"model {IN_CHANNELS_LAST}, ms: {converted:.4g}, {tuned / converted:.2f} times as fast{line}")
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__
