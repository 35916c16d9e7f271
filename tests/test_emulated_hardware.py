"""The emulator itself: tiny kernels, each with a known verdict."""

import subprocess

from emulator import harness


def test_emulator_gives_the_known_verdict_of_tiny_kernels():
    sources = [harness.HERE / "emulator_test.cpp", harness.emulator_object()]
    program = harness.compile_cached(sources, ["-O1"], harness.ROOT / "csrc", "")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
