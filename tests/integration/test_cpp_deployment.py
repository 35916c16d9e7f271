"""AOTInductor packages of accelerated models in the C++ program of examples/cpp, which has no Python."""

import shutil
import subprocess

import pytest
import torch
from chain1d_cases import arguments
from helpers import tool
from tree import ROOT

from res2net_fused import Bottle2neck, accelerate, freeze, hierarchical_conv1d
from res2net_fused._native import library
from res2net_fused.models.registry import create_model

pytestmark = [
    pytest.mark.slow,  # a package takes a minute or two to compile
    pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason or "loaded"),
]
SOURCE = ROOT / "examples" / "cpp"
FORMAT = torch.channels_last


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The path of the built example. One thread: how many there are decides how a call is divided, and so its rounding."""
    folder = tmp_path_factory.mktemp("build")
    cmake = tool(shutil.which("cmake"), "cmake", "apt-get install cmake, or pip install cmake")
    tool(shutil.which("c++") or shutil.which("g++"), "a C++ compiler", "apt-get install g++")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in ([cmake, "-S", SOURCE, "-B", folder, prefix], [cmake, "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder / "run_package"
    torch.set_num_threads(threads)


def run(program, model, x, folder):
    """What the program says of the model's package, whose output must be Python's, and the libraries that it loaded."""
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        assert any("res2net_fused" in str(node.target) for node in exported.graph.nodes)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
        assert (model(x) - torch._inductor.aoti_load_package(package)(x)).abs().max() <= 1e-4 * model(x).abs().max()
        torch.save(x, folder / "input.pt")
        torch.save(torch._inductor.aoti_load_package(package)(x), folder / "expected.pt")
    command = [program, library.cpu_library().path, package, folder / "input.pt", folder / "expected.pt"]
    done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", "LD_DEBUG": "files"})
    assert done.returncode == 0 and done.stdout == "largest difference 0\n", done.stdout + done.stderr[-2000:]
    assert "libres2net_fused_ops.so" in done.stderr and "libpython" not in done.stderr and "libtorch_python" not in done.stderr


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "plain"])
def test_block(program, tmp_path, frozen):
    torch.manual_seed(0)
    block = torch.nn.Sequential(Bottle2neck(64, 16, baseWidth=26, scale=4)).eval().to(memory_format=FORMAT)
    model = freeze(block) if frozen else block
    run(program, model, torch.randn(2, 64, 9, 9).to(memory_format=FORMAT), tmp_path)


def test_rows(program, tmp_path):
    settings, (x, *lists) = arguments("speechbrain", dtype=torch.float32)

    class Chain(torch.nn.Module):
        def forward(self, x):
            return hierarchical_conv1d(x, *lists, **settings)

    run(program, Chain(), x, tmp_path)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "plain"])
def test_network(program, tmp_path, frozen):
    torch.manual_seed(0)
    network = accelerate(create_model("res2net50_26w_4s")).eval().to(memory_format=FORMAT)
    model = freeze(network) if frozen else network
    run(program, model, torch.randn(1, 3, 64, 64).to(memory_format=FORMAT), tmp_path)
