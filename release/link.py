"""Links a library for any Linux from some glibc on, of this processor or another one: what setup.py runs for wheels.

    python release/link.py manylinux_2_28_aarch64 aarch64-linux-gnu-g++ OBJECT... FLAG... -o OUTPUT

GCC compiles the objects (measured: its kernels are faster than clang's), and zig links them, which has the symbols of every
glibc: a symbol that came later is an error here. libstdc++ and libgcc are the compiler's own. Of what GCC's headers use of a
newer libstdc++, `older_systems.cpp` has a copy.
PyTorch's libraries are needed when the library is loaded only: empty ones of their names stand for them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAND_INS = ("torch_cpu", "torch")
PLATFORM = re.compile(r"manylinux_(\d+)_(\d+)_(x86_64|aarch64)")
ZIG = (sys.executable, "-m", "ziglang")


def machine_of(platform: str) -> str:
    return _parts(platform)[1]


def _parts(platform: str) -> tuple[str, str]:
    """The glibc and the processor of a wheel's platform."""
    match = PLATFORM.fullmatch(platform)
    if match is None:
        raise ValueError(f"platform is {platform!r}; expected such as manylinux_2_28_x86_64 or manylinux_2_28_aarch64")
    return f"{match[1]}.{match[2]}", match[3]


def _stand_ins(linker: Sequence[str], folder: Path) -> str:
    """An option for a folder of empty libraries that are named as PyTorch's."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "empty.c"
    source.write_text("")
    for name in STAND_INS:
        library = folder / f"lib{name}.so"
        if not library.exists():
            subprocess.run([*linker, "-shared", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)], check=True)
    return f"-L{folder}"


def _translated(flags: Iterable[str]) -> list[str]:
    """The flags of nvcc's and GCC's links as zig takes them: none for the device, and libraries in no list for the linker."""
    words: list[str] = []
    given = iter(flags)
    for flag in given:
        if flag == "-cudart":
            words += [f"-lcudart_{next(given)}", "-lrt", "-ldl"]
        elif flag == "-Xlinker":
            words += _for_linker(next(given))
        elif flag.startswith(("-Xlinker=", "-Wl,")):
            words += _for_linker(re.split("[=,]", flag, maxsplit=1)[1])
        elif not flag.startswith("-gencode"):
            words.append(flag)
    return words


def _for_linker(text: str) -> list[str]:
    words = text.split(",")
    if words[0] in ("-rpath", "-soname"):
        return [f"-Wl,{words[0]},{words[1]}", *_for_linker(",".join(words[2:]))] if words[2:] else [f"-Wl,{text}"]
    return [word if word.startswith("-l") else f"-Wl,{word}" for word in words if not word.endswith("as-needed")]


def main(platform: str, compiler: str, *rest: str) -> None:
    glibc, machine = _parts(platform)
    linker = (*ZIG, "cc", "-target", f"{machine}-linux-gnu.{glibc}")

    def runtime(name: str) -> str:
        option = "-print-libgcc-file-name" if name == "libgcc.a" else f"-print-file-name={name}"
        return subprocess.run([compiler, option], capture_output=True, text=True, check=True).stdout.strip()

    subprocess.run(
        [compiler, "-O2", "-std=c++20", "-fPIC", "-c", str(HERE / "older_systems.cpp"), "-o", "older_systems.o"], check=True
    )
    # Before what the flags name: a build for this very machine may have left libraries of the same names.
    first = ["-L../ops", _stand_ins(linker, Path("..", "stand_ins")), "-Wl,--no-as-needed"]  # the stand-ins define nothing
    # libgcc before zig's own, whose __builtin_cpu_supports knows no AVX2.
    last = ["older_systems.o", *map(runtime, ("libstdc++.so.6", "libgcc_s.so.1", "libgcc.a")), "-lm", "-lpthread"]
    subprocess.run(
        [*linker, "-s", f"-Wl,--version-script={HERE / 'symbols.map'}", *first, *_translated(rest), *last], check=True
    )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:
        sys.exit(f"link: {error}")
