"""The emulator itself: tiny kernels, each with a known verdict."""

import subprocess

from emulator import harness


def test_emulator_gives_the_known_verdict_of_tiny_kernels():
    sources = [harness.HERE / name for name in ("emulator_test.cpp", "emulator_arrivals_test.cpp")]
    sources.append(harness.emulator_object())
    program = harness.compile_cached(sources, [*harness.KERNEL_FLAGS], harness.ROOT / "csrc", "")
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_emulated_primitives_do_what_they_are_defined_to_do():
    """The test that is the first to run on a GPU, in its host form."""
    source = harness.ROOT / "tests/gpu/primitives.cu"
    flags = [*harness.KERNEL_FLAGS, "-x", "c++", str(source), "-x", "none"]
    program = harness.BUILD / "primitives"
    harness.BUILD.mkdir(parents=True, exist_ok=True)
    command = ["g++", *harness.FLAGS, *harness.includes(harness.ROOT / "csrc"), *flags, str(harness.emulator_object())]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_descriptor_holds_the_address_alone(tmp_path):
    """Bits above the 18 of an address in shared memory would change the matrix's strides."""
    source = tmp_path / "descriptor.cpp"
    source.write_text(
        '#include "cuda/chain/hardware_sm90.h"\n'
        "static_assert(matrix_descriptor(0x3fff0, 128, 256) == (uint64_t(0x3fff) | uint64_t(8) << 16 | uint64_t(16) << 32));\n"
        "static_assert(matrix_descriptor(0x1040000 + 0x40, 128, 256) == matrix_descriptor(0x40, 128, 256));\n"
    )
    command = ["g++", *harness.FLAGS, *harness.includes(harness.ROOT / "csrc"), "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
