"""The emulator itself: tiny kernels, each with a known verdict."""

import subprocess

from emulator import harness


def test_emulator_gives_the_known_verdict_of_tiny_kernels():
    sources = [harness.HERE / "emulator_test.cpp", harness.emulator_object()]
    program = harness.compile_cached(sources, ["-O1"], harness.ROOT / "csrc", "")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_emulated_primitives_do_what_they_are_defined_to_do():
    """The test that is the first to run on a GPU, in its host form."""
    source = harness.ROOT / "tests/cuda/primitives.cu"
    flags = ["-O1", "-x", "c++", str(source), "-x", "none"]
    program = harness.BUILD / "primitives"
    harness.BUILD.mkdir(parents=True, exist_ok=True)
    command = ["g++", *harness.FLAGS, *harness.includes(harness.ROOT / "csrc"), *flags, str(harness.emulator_object())]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
