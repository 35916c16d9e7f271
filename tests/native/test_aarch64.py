"""The published aarch64 wheel under an aarch64 Python with PyTorch, which QEMU runs: downloads half a gigabyte."""

from __future__ import annotations

import platform
import shutil

import published
import pytest
from aarch64 import Emulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel is built and emulated on x86-64"),
]
PLATFORM = "manylinux_2_28_aarch64"
BLOCKS = """
import copy, platform, sys
import torch
import res2net_fused as rf
from res2net_fused._native import library
from res2net_fused.backends.cpu.settings import available_instruction_sets

assert rf.__file__.startswith(sys.argv[1]), rf.__file__
status = library.cpu_library()
assert status.loaded, status.reason
print(platform.machine(), *available_instruction_sets())
torch.manual_seed(0)

def error(out, ref):
    return float((out.double() - ref).norm() / ref.norm())

for layout in (torch.contiguous_format, torch.channels_last):
    for scale, width, stride, kind in ((4, 26, 1, "normal"), (8, 14, 1, "normal"), (4, 26, 2, "stage"), (3, 7, 1, "stage")):
        down = torch.nn.Conv2d(24, 64, 1, stride, bias=False)
        block = rf.Bottle2neck(24, 16, stride, down, baseWidth=4 * width, scale=scale, stype=kind)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, 24, 11, 9).to(memory_format=layout)
        exact = copy.deepcopy(block).double().requires_grad_(True)
        with torch.no_grad():
            out, said = block.eval()(x), str(rf.explain(block, x))
            ref = exact.eval()(x.double())
        print("inference", scale, width, stride, kind, error(out, ref), " cpu " in said)
    block.train(), exact.train()
    block(x).square().sum().backward(), exact(x.double()).square().sum().backward()
    print("training", max(error(p.grad, q.grad) for p, q in zip(block.parameters(), exact.parameters())), True)
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    files = published.published(PLATFORM, folder / "files")
    made = Emulated(folder)
    shutil.unpack_archive(published.wheel_in(files, PLATFORM), made.site, "zip")
    yield made
    shutil.rmtree(folder)  # two gigabytes


def test_blocks_agree_with_float64(emulated):
    first, *rows = emulated.run("-c", BLOCKS, emulated.site).splitlines()
    assert first == "aarch64 neon"
    assert len(rows) == 10
    for row in rows:
        *_, error, ran = row.split()
        assert float(error) < (5e-6 if row.startswith("inference") else 5e-5) and ran == "True", row
