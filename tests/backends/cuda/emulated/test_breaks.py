"""Breaks the chain kernel in one place at a time; the named checks have to turn red."""

import pytest
from emulator import breaks, harness, mutate

WGMMA = "cuda/chain/wgmma_kernel.cuh"
STRIP, LAYOUT, GEOMETRY = "cuda/chain/strip_kernel.cuh", "cuda/chain/strip_layout.cuh", "cuda/plan/geometry.h"
ARGUMENTS, WORDS = "cuda/plan/arguments.h", "cuda/chain/words.h"
CLUSTER = "cuda/chain/cluster_kernel.cuh"
# name, case, file, its text, the replacement, checks that must turn red
BREAKS = [
    ("nothing broken", "strips", STRIP, "// cleared before", "// cleared before", ""),
    ("waits for one group too few", "strips", STRIP, "wait(g.stages - 2 +", "wait(g.stages - 1 +", "in-flight wrong"),
    ("older code waits too little", "older", STRIP, "wait(g.stages - 2 +", "wait(g.stages - 1 +", "in-flight wrong"),
    ("weights of another chunk in older code", "older", STRIP, "+ cursor.chunk) * g.stage", ") * g.stage", "wrong"),
    ("waits too little for x", "strips", STRIP, "wait(g.chunks - 1)", "wait(g.chunks)", "in-flight wrong"),
    ("one stage for all weights", "strips", LAYOUT, "index * g.stage_bytes", "0 * index * g.stage_bytes", "in-flight wrong"),
    ("weights not advanced", "stream", STRIP, "advance(fetch);\n          if", "if", "wrong"),
    ("barrier in one warp only", "strips", STRIP, "    cta.pass_group();\n", "if (thread < 32) sync_cta();\n", "divergence"),
    (
        "a lane skips the matrix load",
        "strips",
        STRIP,
        "          const FragmentA matrix = rounded",
        "if (lane == 5) continue;\nconst FragmentA matrix = rounded",
        "divergence",
    ),
    ("weights read although they may be written", "strips", STRIP, "if (!a.weights_stand) {", "if (false) {", "predecessor"),
    (
        "the passed group copied before the wait",
        "strips",
        STRIP,
        "    clear_strips();\n",
        "    clear_strips();\n    this->make_tables();\n    sync_cta();\n    cta.pass_group();\n",
        "predecessor",
    ),
    (
        "the next kernel begins too early",
        "strips",
        STRIP,
        "    predecessor_wait();  // x is there",
        "    // x is there",
        "predecessor",
    ),
    ("strips not cleared", "strips", STRIP, "    clear_strips();\n", "\n", "uninitialised wrong"),
    ("sums not cleared", "strips", STRIP, "        cta.start_sums(sums, step, cta.adds_bias());\n", "\n", "wrong"),
    ("tap one column off", "strips", LAYOUT, "tap % 3 - 1) * g", "tap % 3) * g", "wrong"),
    ("shifts of another turn", "stream", STRIP, "turn_at(chunk * turns)", "turn_at(0)", "wrong"),
    ("tables not made", "strips", STRIP, "    this->make_tables();\n", "\n", "uninitialised"),
    (
        "no slot for the left padding",
        "strips",
        LAYOUT,
        "return g.dilation + line * g.pitch",
        "return line * g.pitch",
        "out-of-bounds",
    ),
    ("rows behind the last are computed", "strips", STRIP, "position < end ? position : end - 1", "position", "out-of-bounds"),
    (
        "columns right of the image get values",
        "strips",
        STRIP,
        " & (unsigned(column - r.outputs.first) < unsigned(r.outputs.count))",
        "",
        "wrong",
    ),
    (
        "rows outside the image get values",
        "strips",
        STRIP,
        "(int(line.word[0]) != NONE) & (unsigned(column - r.outputs",
        "(unsigned(column - r.outputs",
        "wrong",
    ),
    ("rows outside the image are read", "strips", LAYOUT, "(unsigned(row) < unsigned(g.height)) &", "", "out-of-bounds"),
    ("images behind the last are read", "images", LAYOUT, " & (first_image + image < g.images)", "", "out-of-bounds"),
    ("rows above the image are copied", "strips", LAYOUT, "first > 0 ? first : 0;", "first;", "out-of-bounds"),
    ("images behind the last are copied", "images", LAYOUT, "left < g.tile_images ? left :", "", "out-of-bounds"),
    ("all images copied into the first", "images", STRIP, "+ image * g.period, left", ", left", "wrong"),
    ("lines of x one pixel too long", "stream", STRIP, "2 * (g.width - per_line)", "2 * (g.width - per_line + 1)", "wrong"),
    ("one row too many owned", "strips", LAYOUT, "< unsigned(g.owned_lines)", "<= unsigned(g.owned_lines)", "race"),
    ("one column too many owned", "stream", STRIP, "< unsigned(r.owned.count)", "<= unsigned(r.owned.count)", "race"),
    (
        "columns of the whole line are loaded",
        "stream",
        LAYOUT,
        "g.stored : to_right) - left",
        "g.stored : to_right)",
        "out-of-bounds",
    ),
    ("slot pitch not a multiple of 16", "strips", GEOMETRY, "return 16 * (swizzled", "return 8 + 16 * (swizzled", "misaligned"),
    ("swizzle that leaves its pixel", "w14", LAYOUT, "(2 * DEPTHS - 1) * 16", "7 * 16", "conflicts"),
    ("no swizzle", "strips", LAYOUT, "(2 * DEPTHS - 1) * 16", "0", "conflicts"),
    ("passed group left out", "strips", STRIP, "    cta.pass_group();\n", "\n", "wrong"),
    ("bias of another step", "strips", STRIP, "a.bias + (step * g.packed_columns * 8 +", "a.bias + (", "wrong"),
    (
        "channels between the groups are read",
        "padded",
        ARGUMENTS,
        "> filled_bytes) a.load_width = filled",
        "> 0) a.load_width += 4; //",
        "wrong",
    ),
    (
        "channels between the groups are written",
        "padded",
        STRIP,
        "(j < SURE || r.filled > j * 8)",
        "(j < COLUMNS)",
        "padding",
    ),
    ("halo too small", "strips", GEOMETRY, "(recomputes ? problem.steps : 1)", "(recomputes ? problem.steps - 1 : 1)", "wrong"),
    (
        "no zero row between images",
        "images",
        GEOMETRY,
        "tile.whole ? problem.height + problem.dilation :",
        "tile.whole ? problem.height :",
        "wrong",
    ),
    ("passed group not added", "added", STRIP, "      add_passed_group();\n", "\n", "wrong"),
    ("passed group added before x is there", "added", STRIP, "wait(g.stages - 2);", "wait(g.stages - 1);", "in-flight wrong"),
    ("a depth of half as many channels", "odd", LAYOUT, "PER_CHUNK = 16 / BYTES", "PER_CHUNK = 8", "wrong"),
    ("pairs of channels at odd places", "odd", STRIP, "if (!a.whole_pairs) {", "if (false) {", "misaligned"),
    ("sends to the wrong part", "parts", CLUSTER, "part * g.channel_parts + receiver, u", "part * g.channel_parts, u", "wrong"),
    ("sends to a part that does not exist", "parts", CLUSTER, "part >= 0 && part <", "part <", "out-of-bounds"),
    ("halo above not sent", "parts", CLUSTER, "int part = row_part - 1; part", "int part = row_part; part", "wrong"),
    ("halo below not sent", "parts", CLUSTER, "part <= row_part + 1;", "part <= row_part;", "wrong"),
    ("halo one row off", "parts", CLUSTER, "(row_part - part) * g.rows;", "(row_part - part) * (g.rows - 1);", "wrong"),
    ("halo columns of one part only", "parts", CLUSTER, "g.channel_parts - (part == row_part)", "g.channel_parts - 1", "wrong"),
    (
        "sends after the last barrier",
        "parts",
        CLUSTER,
        "|| step + 1 == g.steps) return;",
        ") return;\nif (step + 1 == g.steps) {\n  send(step, row_part);\n  return;\n}",
        "lifetime",
    ),
    ("one barrier for the bytes of all steps", "parts", CLUSTER, "MAX_STAGES + step % 2)", "MAX_STAGES)", "wrong"),
    ("halo not counted", "parts", CLUSTER, "halo * chunks", "0 * chunks", "arrival"),
    ("rows below the image counted", "parts", LAYOUT, "end < g.height ? end : g.height;", "end;", "out-of-bounds"),
    ("x loaded for other parts' channels", "parts", CLUSTER, "step == 0 || !g.sends", "true", "race"),
    ("slices before the chunk", "shared", CLUSTER, "if (turn < 0) turn += g.warps_k;", "", "out-of-bounds"),
    ("own sums added twice", "shared", CLUSTER, "if (k == warp_k) continue;", "", "uninitialised"),
    (
        "every part passes the whole group",
        "parts",
        CLUSTER,
        "channel_part * threads + thread, threads * g.channel_parts",
        "thread, threads",
        "race",
    ),
    ("weights of the first part for all", "shared", CLUSTER, "_columns + first_column())", "_columns)", "wrong"),
    ("no room behind the last plane", "wgmma", GEOMETRY, " + (PLANE_ROWS - 1) * 16", "", "out-of-bounds"),
    ("an even number of slots in a plane", "wgmma_images", GEOMETRY, "(slots | 1) * 16", "(slots + slots % 2) * 16", ""),
    ("planes that overlap", "wgmma", GEOMETRY, "(slots | 1) * 16", "slots / 2 * 16", "race wrong"),
    (
        "a tile without positions goes on",
        "wgmma",
        WGMMA,
        "(position < g.positions(step) ? position : first)",
        "position",
        "out-of-bounds",
    ),
    ("sums of the wrong rows", "wgmma", WGMMA, "+ warp * 16 + lane / 4, PLANE_ROWS", "+ warp * 32 + lane / 4, 16", "wrong"),
    ("shifts of another chunk", "wgmma", WGMMA, "turn_at(chunk * turns)", "turn_at(0)", "wrong"),
    ("shifts of planes in bytes", "wgmma_images", LAYOUT, "PLANES ? shift / 16", "PLANES ? shift", "out-of-bounds"),
    ("one thread waits for a stage", "wgmma", WGMMA, "if (uniform(thread / 32) > 0 ||", "if (thread > 0 ||", "divergence"),
    ("weights of one slice for all", "wgmma", WGMMA, "weight.moved(g.packed", "weight.moved(0 * g.packed", "wrong"),
    (
        "halves of K swapped in the weights",
        "wgmma",
        WGMMA,
        "SharedMatrix(weights, 128, Base::COLUMN_BYTES)",
        "SharedMatrix(weights, Base::COLUMN_BYTES, 128)",
        "wrong",
    ),
    (
        "the stage in use released",
        "wgmma",
        WGMMA,
        "      if (chunk > 0) release(next.chunk.stage);\n      if (!next",
        "      release(stage_after(next));\n      if (!next",
        "race",
    ),
    ("stages filled a round too early", "wgmma", WGMMA, "(cursor.round - 1) & 1", "cursor.round & 1", "race"),
    ("one warp releases a stage for all", "wgmma", WGMMA, "this->threads / 32", "1", "race"),
    ("one lane leaves products out", "wgmma", WGMMA, "multiply_async<", "if (lane != 9) multiply_async<", "divergence"),
    ("pool reads a column too far", "stage", STRIP, "if (!in_image(column + dx)) continue;", "", "wrong"),
]


def _marked():
    """Each break compiles the kernel anew: every third runs by default, the others with the slow tests."""
    for i, row in enumerate(BREAKS):
        yield pytest.param(*row, id=row[0].replace(" ", "-"), marks=[pytest.mark.slow] * (i % 3 > 0))


@pytest.mark.parametrize("name, case, file, old, new, expected", list(_marked()))
def test_emulated_break_is_noticed(name, case, file, old, new, expected, tmp_path):
    def edit(text):
        assert text.count(old) == 1, f"{text.count(old)} places match {old!r}"
        return text.replace(old, new)

    red = breaks.red_checks(breaks.broken_copy(tmp_path, file, edit), (case,))
    assert set(expected.split()) <= set(red), red
    assert expected or not red


@pytest.mark.slow
def test_emulated_truncation_to_tf32_is_noticed(tmp_path):
    def edit(text):
        assert text.count("word = round_to_tf32(word)") == 1
        return text.replace("word = round_to_tf32(word)", "word = word")

    csrc = breaks.broken_copy(tmp_path, WORDS, edit)
    assert "wrong" in harness.check(breaks.CASES["odd"], integers=False, csrc=csrc, flags=breaks.FLAGS)


def test_emulated_breaks_cover_every_ordering_statement():
    found = [removal.statement.partition("(")[0] for removal in breaks.removals()]
    assert found.count("cluster_arrive") == found.count("cluster_wait") == 1 and found.count("sync_cta") >= 6
    assert found.count("arrival_wait_remote") == found.count("arrival_signal") == found.count("arrival_wait") == 1
    assert found.count("arrival_wait_together") == 2
    assert found.count("arrival_init") == 4 and found.count("arrival_expect") == 3
    assert found.count("copy_async_wait") >= 2 and found.count("copy_async_commit") >= 3
    assert found.count("predecessor_wait") == 2 and found.count("successor_begin") == 1
    assert found.count("proxy_fence") >= 1 and {"products_begin", "products_commit", "products_wait"} <= set(found)
    seen = {item for start in range(len(found)) for item in mutate.rotated(list(range(len(found))), start)}
    assert seen == set(range(len(found)))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(breaks.removals())))
def test_emulated_removal_of_an_ordering_statement_is_noticed(index):
    assert mutate.noticed(breaks.removals()[index])
