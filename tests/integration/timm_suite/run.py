"""Runs timm's own tests of its Res2Net models, plain and with every model accelerated, and compares what passes.

    python tests/integration/timm_suite/run.py                          # every Res2Net and DLA-Res2Net model
    python tests/integration/timm_suite/run.py -k "res2net50d and script"

The table counts a test as passed whose one difference is explained by rounding, and names it with its norms below.

The tests are those of the installed timm's sdist, which pip downloads to build/. Tests that download weights are left out.
Arguments are pytest's. Exit status: 0 where every test that passes plain passes accelerated, 1 where one does not, 2 where
the tests cannot be had.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "timm_suite"
ROUNDED = "differs by rounding"  # how an outcome begins that `accelerated.py` has judged
MODELS = "res2n and not pretrained"  # names hold res2net or res2next


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="test", metavar="EXPRESSION", help="of these tests, as pytest's")
    options, others = parser.parse_known_args(arguments)
    arguments = [*others, "-k", f"{MODELS} and ({options.k})"]
    try:
        source = sources()
    except subprocess.CalledProcessError:
        print("peers: timm's sdist, which holds its tests, cannot be downloaded", file=sys.stderr)
        return 2
    plain, accelerated = (outcomes(source, name, arguments) for name in ("plain", "accelerated"))
    if not plain or plain.keys() != accelerated.keys():
        print(f"peers: {len(plain)} tests ran plain and {len(accelerated)} accelerated", file=sys.stderr)
        return 2
    print(table(plain, accelerated))
    lost = [test for test, outcome in plain.items() if passes(outcome) and not passes(accelerated[test])]
    explained = [f"{test}: {outcome}" for test, outcome in accelerated.items() if outcome.startswith(ROUNDED)]
    print("\n".join([*explained, *(f"lost: {test}: {accelerated[test]}" for test in lost)]))
    return int(bool(lost))


def passes(outcome: str) -> bool:
    return outcome.startswith(("passed", ROUNDED))


def sources() -> Path:
    """The unpacked sdist of the installed version."""
    version = importlib.metadata.version("timm")
    folder = FOLDER / f"timm-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", "timm", "--no-deps", "--dest", str(FOLDER)]
        subprocess.run([*pip, f"timm=={version}"], check=True)
        with tarfile.open(FOLDER / f"timm-{version}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    return folder


def outcomes(source: Path, name: str, arguments: Sequence[str]) -> dict[str, str]:
    """The outcome of each test in a process of its own, by the test's name: "passed", "skipped" or the error's first line.

    One that `accelerated.py` has judged otherwise than timm says so.
    """
    report = FOLDER / f"{name}.xml"
    report.unlink(missing_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)]
    plugin = ["-p", "accelerated"] if name == "accelerated" else []
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, f"--junitxml={report}",
         "tests/test_models.py", *arguments],
        cwd=source, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    found = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        judged = next((child.attrib["value"] for child in case.iter("property")), "passed")
        kind = judged if problem is None else problem.tag
        found[case.attrib["name"]] = kind if problem is None or kind != "failure" else problem.attrib["message"].splitlines()[0]
    return found


def table(plain: dict[str, str], accelerated: dict[str, str]) -> str:
    """How many tests of each function pass."""
    function = {test: test.partition("[")[0] for test in plain}
    ran = Counter(function.values())
    passed = [Counter(function[t] for t, outcome in some.items() if passes(outcome)) for some in (plain, accelerated)]
    rows = [(name, ran[name], *(count[name] for count in passed)) for name in sorted(ran)]
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
    lines = [f"{'test':48}{'tests':>8}{'plain':>8}{'accelerated':>13}"]
    return "\n".join([*lines, *(f"{name:48}{tests:8}{a:8}{b:13}" for name, tests, a, b in rows)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
