"""Launches of the three CUDA kernels, cut by hand at odd sizes: the emulator runs them, and a card where there is one."""

import torch
from emulator import harness
from emulator.harness import Case

HALVES = (torch.bfloat16, torch.float16)
STAGE = {"hierarchical": False, "pool": "avg3"}
# All widths that have an instance of their own, and others of each kind, at odd sizes. The plan cuts them.
WIDTHS = [
    Case(2, 4, 2, 5, 9),
    Case(8, 4, 1, 9, 7),
    Case(14, 8, 1, 9, 11),
    Case(16, 3, 3, 7, 5),
    Case(26, 4, 1, 9, 13),
    Case(26, 8, 1, 5, 7),
    Case(28, 8, 2, 7, 7),
    Case(30, 2, 1, 1, 1),
    Case(40, 4, 1, 6, 5),
    Case(48, 2, 3, 5, 9),
    Case(52, 4, 1, 7, 9),
    Case(56, 8, 1, 5, 3),
    Case(64, 4, 1, 5, 7),
    Case(80, 3, 1, 3, 5),
    Case(96, 2, 1, 5, 7),
    Case(104, 4, 1, 5, 4),
    Case(112, 3, 1, 4, 5),
    Case(192, 2, 1, 3, 5),
    Case(208, 4, 1, 3, 3),
]
# Every way to cut the work, by hand: row strips, column parts, several images, more and fewer warps, long and short pipelines.
STRIP = {"whole": 0, "images": 1}
TILES = [
    Case(26, 4, 2, 9, 7, tile=STRIP | {"rows": 4, "columns": 7, "warps_m": 3, "slices": 18, "stages": 2}),
    Case(26, 4, 1, 7, 11, tile=STRIP | {"rows": 3, "columns": 4, "warps_m": 2, "slices": 6, "stages": 3}),
    Case(14, 8, 1, 5, 17, tile=STRIP | {"rows": 2, "columns": 9, "warps_m": 4, "slices": 3, "stages": 4}),
    Case(28, 3, 5, 6, 6, tile={"whole": 1, "images": 2, "rows": 6, "columns": 6, "warps_m": 1, "slices": 18, "stages": 2}),
    Case(26, 4, 7, 7, 7, tile={"whole": 1, "images": 3, "rows": 7, "columns": 7, "warps_m": 2, "slices": 9, "stages": 2}),
    Case(52, 4, 1, 10, 9, tile=STRIP | {"rows": 5, "columns": 9, "warps_m": 1, "slices": 9, "stages": 3}),
    Case(52, 2, 1, 10, 9, tile=STRIP | {"rows": 10, "columns": 5, "warps_m": 2, "slices": 36, "stages": 2}),
    Case(104, 3, 1, 6, 7, tile=STRIP | {"rows": 3, "columns": 7, "warps_m": 2, "slices": 3, "stages": 4}),
    Case(104, 3, 2, 5, 5, tile={"whole": 1, "images": 2, "rows": 5, "columns": 5, "warps_m": 1, "slices": 21, "stages": 2}),
    Case(40, 4, 1, 9, 7, tile=STRIP | {"rows": 4, "columns": 7, "warps_m": 1, "slices": 27, "stages": 2}),
]
SETTINGS = [
    Case(26, 4, 1, 9, 11, settings=STAGE | {"stride": 2}),
    Case(14, 4, 2, 8, 6, settings={"hierarchical": False, "stride": 2, "pool": "avg3_nopad"}),
    Case(28, 4, 1, 9, 9, settings=STAGE | {"stride": 2, "dilation": 2}),
    Case(52, 3, 1, 9, 14, settings=STAGE | {"stride": 2}, tile=STRIP | {"rows": 2, "columns": 3}),
    Case(26, 4, 1, 7, 9, settings=STAGE),
    Case(26, 4, 1, 7, 9, settings={"hierarchical": False, "passthrough": "none"}),
    Case(26, 4, 1, 7, 9, settings={"pool": "avg3_nopad"}),
    Case(26, 4, 1, 9, 9, settings={"dilation": 3}),
    Case(14, 3, 2, 9, 9, settings={"dilation": 2}, tile={"whole": 1, "images": 2, "rows": 9, "columns": 9, "warps_m": 2}),
    Case(14, 3, 1, 9, 12, settings={"dilation": 2}, tile=STRIP | {"rows": 2, "columns": 4}),
    Case(26, 4, 1, 7, 9, settings={"passthrough": "first"}),
    Case(26, 4, 1, 7, 9, settings={"passthrough": "first_added"}),
    Case(14, 2, 2, 7, 9, settings={"passthrough": "first_added", "pool": "avg3"}),
    Case(26, 3, 1, 7, 9, settings={"passthrough": "none"}),
    Case(48, 1, 1, 7, 9, settings={"passthrough": "none"}),
    Case(26, 4, 1, 7, 9, settings={"activation": "none"}),
    Case(26, 4, 1, 7, 9, settings={"activation": "hardtanh20"}),
    Case(26, 4, 1, 7, 9, pad=6),  # 16-byte copies, the last of each slot cut short
    Case(14, 8, 1, 7, 9, pad=2),
    Case(26, 4, 2, 7, 9, pad=6, fill=True),
    Case(14, 4, 1, 9, 9, pad=2, fill=True, settings=STAGE | {"stride": 2}),
    Case(28, 4, 1, 7, 9, pad=2),  # 4-byte copies although the groups would allow 8
]
named = {"ids": str}
PLAN_FIELDS = (
    "instance rows columns images whole warps_m warps_n slices stages row_parts channel_parts warps_k"
).split()  # what a launch is told
# float32 through TF32: odd widths too, dense and in padded slots
F32 = torch.float32
SINGLES = [
    Case(3, 3, 1, 3, 5, F32),
    Case(14, 8, 1, 5, 17, F32, tile=STRIP | {"rows": 2, "columns": 9, "warps_m": 4, "slices": 3, "stages": 4}),
    Case(26, 4, 2, 9, 7, F32, tile=STRIP | {"rows": 4, "columns": 7, "warps_m": 3, "slices": 18, "stages": 2}),
    Case(27, 4, 1, 9, 13, F32),
    Case(26, 4, 7, 7, 7, F32, tile={"whole": 1, "images": 3, "rows": 7, "columns": 7, "warps_m": 2, "slices": 9, "stages": 2}),
    Case(48, 2, 3, 5, 9, F32),
    Case(52, 4, 1, 7, 9, F32),
    Case(104, 3, 1, 5, 4, F32),
    Case(208, 2, 1, 3, 3, F32),
    Case(27, 4, 1, 9, 11, F32, settings=STAGE | {"stride": 2}),
    Case(26, 3, 2, 8, 6, F32, settings={"hierarchical": False, "stride": 2, "pool": "avg3_nopad", "dilation": 2}),
    Case(28, 3, 1, 9, 12, F32, settings={"dilation": 2, "activation": "hardtanh20"}, tile=STRIP | {"rows": 2, "columns": 4}),
    Case(26, 4, 1, 7, 9, F32, pad=2),  # 16-byte copies, the last of each slot cut short
    Case(27, 3, 2, 7, 9, F32, pad=1),
    Case(27, 3, 2, 7, 9, F32, pad=1, fill=True),
    Case(26, 4, 1, 7, 9, F32, settings={"passthrough": "first_added"}),
    Case(27, 2, 2, 7, 9, F32, settings={"passthrough": "first_added", "pool": "avg3_nopad"}, pad=1, fill=True),
]


def parts(instance: str, row_parts: int, channel_parts: int, **tile: int) -> dict[str, int]:
    """A launch of the cluster kernel. rows, columns and whole come from `shared_by`, what is not named is 1."""
    rest = dict.fromkeys(("images", "warps_m", "warps_n", "warps_k"), 1) | {"stages": 2}
    index = harness.INSTANCES.index(f"cluster_{instance}")
    return rest | {"instance": index, "row_parts": row_parts, "channel_parts": channel_parts} | tile


def shared_by(case: Case, tile: dict[str, int]) -> Case:
    whole = int(tile["row_parts"] == 1 and "rows" not in tile)
    rows = case.height if whole else -(-case.height // tile["row_parts"])
    tile = {"whole": whole, "rows": rows, "columns": case.columns} | tile
    return harness.replace(case, tile=tile, clusters=True)


# Every way to share the work, by hand, at odd sizes and numbers of images: channels, rows, both; strips that compute their
# halos, several images; padded channel parts; one and several passes, chunks and warps on the same sums, some without slices.
SHARED = [
    shared_by(Case(26, 4, 1, 7, 9), parts("c2t2", 1, 2, warps_m=3, slices=18)),
    shared_by(Case(26, 4, 3, 7, 5), parts("c2t2", 1, 2, warps_m=1, slices=18, warps_k=3)),
    shared_by(Case(26, 8, 2, 7, 5), parts("c2t2", 3, 2, slices=3, stages=4, warps_k=4)),
    shared_by(Case(26, 3, 1, 7, 5), parts("c4t2", 4, 1, slices=6, stages=3, warps_k=2)),
    shared_by(Case(14, 8, 1, 5, 11), parts("c2t2", 5, 1, slices=9, warps_k=3)),
    shared_by(Case(30, 2, 3, 5, 7), parts("c2t2", 1, 2, warps_m=2, slices=9)),
    shared_by(Case(52, 5, 1, 7, 9), parts("c2t2", 2, 4, warps_m=2, slices=12, stages=3, warps_k=2)),
    shared_by(Case(52, 4, 5, 5, 3), parts("c4t2", 1, 2, images=2, slices=9, stages=4, warps_k=5)),
    shared_by(Case(56, 6, 1, 9, 7), parts("c7t2", 5, 1, slices=36, warps_k=12)),
    shared_by(Case(52, 4, 1, 9, 7), parts("c2t2", 1, 4, rows=4, slices=36, warps_m=2)),
    shared_by(Case(52, 4, 1, 6, 11), parts("c4t2", 1, 2, rows=3, columns=6, slices=9, warps_m=1, warps_k=2)),
    shared_by(Case(104, 4, 1, 5, 7), parts("c2t2", 1, 7, slices=21, stages=3, warps_m=2, warps_k=3)),
    shared_by(Case(104, 3, 2, 5, 7), parts("c4t2", 2, 4, slices=9, stages=4, warps_k=7)),
    shared_by(Case(104, 3, 1, 5, 7), parts("c7t2", 3, 2, slices=3, stages=3, warps_k=2)),
    shared_by(Case(104, 3, 1, 3, 7), parts("c2t2", 3, 2, slices=9, warps_n=4, warps_k=2)),
    shared_by(Case(48, 7, 1, 7, 7), parts("c2t2", 2, 3, slices=27, warps_m=1)),
    shared_by(Case(10, 4, 1, 3, 5), parts("c2t2", 3, 1, slices=3)),
]
SHARED_SETTINGS = [
    shared_by(Case(26, 4, 1, 7, 9, settings={"passthrough": "first"}), parts("c2t2", 3, 2, slices=9, warps_k=2)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"passthrough": "first_added"}), parts("c2t2", 3, 2, slices=9, warps_k=2)),
    shared_by(Case(26, 3, 2, 7, 9, settings={"passthrough": "first_added", "pool": "avg3"}), parts("c2t2", 1, 2, slices=18)),
    shared_by(Case(26, 3, 1, 7, 9, settings={"passthrough": "none"}), parts("c2t2", 2, 2, slices=9, warps_m=2)),
    shared_by(Case(26, 4, 1, 9, 9, settings={"dilation": 2}), parts("c2t2", 3, 2, slices=9)),
    shared_by(Case(26, 4, 1, 9, 5, settings={"dilation": 3}), parts("c2t2", 3, 2, slices=9, warps_k=3)),
    shared_by(Case(28, 3, 2, 7, 9, settings={"dilation": 2}), parts("c2t2", 1, 2, images=2, slices=18, warps_m=4)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"pool": "avg3_nopad"}), parts("c2t2", 3, 2, slices=18)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"activation": "hardtanh20"}), parts("c2t2", 3, 2, slices=18)),
    shared_by(Case(26, 4, 1, 7, 9, settings={"activation": "none"}), parts("c2t2", 1, 2, slices=18, warps_k=4)),
    shared_by(Case(26, 4, 1, 7, 9, pad=6), parts("c2t2", 2, 2, slices=18)),
    shared_by(Case(14, 8, 1, 7, 9, pad=2), parts("c2t2", 3, 1, slices=9)),
    shared_by(Case(26, 4, 2, 7, 9, pad=6, fill=True), parts("c2t2", 2, 2, slices=18, warps_k=2)),
    shared_by(Case(52, 4, 1, 7, 9, pad=4, fill=True), parts("c4t2", 2, 2, slices=36, warps_k=2)),
    shared_by(Case(28, 4, 1, 7, 9, pad=2), parts("c2t2", 2, 2, slices=18)),
    # parts that send nothing
    shared_by(Case(48, 1, 2, 5, 9, settings={"passthrough": "none"}), parts("c2t2", 1, 3, slices=27, warps_m=2)),
    shared_by(Case(26, 4, 1, 9, 15, settings=STAGE | {"stride": 2}), parts("c2t2", 1, 2, rows=5, columns=8, slices=18)),
    shared_by(Case(26, 4, 1, 7, 9, settings=STAGE), parts("c2t2", 1, 2, rows=4, slices=9, warps_k=2)),
    shared_by(Case(104, 4, 1, 5, 7, settings=STAGE), parts("c2t2", 1, 7, slices=21, warps_k=3)),
]


def cut(instance: str, **tile: int) -> dict[str, int]:
    """A launch of the wgmma kernel; without rows and columns, of whole images."""
    rest = {"images": 1, "warps_m": 4, "warps_n": 1, "stages": 2, "whole": int("rows" not in tile)}
    return rest | {"instance": harness.INSTANCES.index(f"wgmma_{instance}")} | tile


def wide(case: Case) -> Case:
    tile = {"rows": case.height, "columns": case.columns} | case.tile
    return harness.replace(case, wgmma=True, tile=tile)


# Every way to cut the work, by hand, at odd sizes: strips, column parts, several images; one and more warpgroups along pixels
# and channels; weights that stay and that stream; last tiles with few positions and with none.
CUTS = [
    wide(Case(48, 2, 3, 5, 9, tile=cut("c6t2", slices=27))),
    wide(Case(48, 4, 1, 9, 13, tile=cut("c6t2", rows=5, warps_m=8, slices=9, stages=3))),
    wide(Case(50, 4, 1, 9, 11, tile=cut("c7t2", rows=4, slices=12, stages=4))),
    wide(Case(52, 4, 3, 7, 5, tile=cut("c7t2", images=2, warps_m=8, slices=36))),
    wide(Case(52, 3, 1, 5, 19, tile=cut("c7t2", rows=3, columns=7, slices=3, stages=4))),
    wide(Case(56, 8, 2, 5, 3, tile=cut("c7t2", rows=2, slices=36))),
    wide(Case(96, 2, 1, 7, 5, tile=cut("c12t2", slices=18, stages=2))),
    wide(Case(96, 3, 1, 5, 7, tile=cut("c6t2", rows=3, warps_n=2, slices=9, stages=3))),
    wide(Case(104, 4, 1, 7, 5, tile=cut("c7t2", rows=4, warps_m=8, warps_n=2, slices=21))),
    wide(Case(104, 3, 2, 5, 9, tile=cut("c14t2", images=2, warps_m=8, slices=9))),
    wide(Case(112, 3, 3, 3, 5, tile=cut("c14t2", images=3, slices=21))),
    wide(Case(112, 4, 1, 6, 5, tile=cut("c7t2", rows=2, warps_n=2, slices=9, stages=3))),
    wide(Case(208, 2, 1, 3, 5, tile=cut("c14t2", warps_n=2, slices=3, stages=3))),
]
CUT_SETTINGS = [
    wide(Case(52, 4, 1, 9, 9, settings={"dilation": 2}, tile=cut("c7t2", rows=3, slices=12))),
    wide(Case(52, 3, 2, 7, 9, settings={"dilation": 3}, tile=cut("c7t2", slices=12))),
    wide(Case(48, 4, 1, 7, 9, settings=STAGE, tile=cut("c6t2", rows=4, slices=27))),
    wide(Case(52, 4, 1, 7, 9, settings={"passthrough": "first_added"}, tile=cut("c7t2", rows=4, slices=12))),
    wide(Case(52, 1, 1, 7, 9, settings={"passthrough": "none", "activation": "none"}, tile=cut("c7t2", slices=36))),
    wide(Case(52, 4, 2, 7, 9, pad=4, fill=True, tile=cut("c7t2", rows=7, slices=36))),
    wide(Case(54, 3, 1, 7, 9, pad=2, tile=cut("c7t2", slices=12))),
]
