"""Fuzzes all that callers may call, for long: `make fuzz`.

    python tests/robustness/fuzz/run.py                                # 5,000 cases
    python tests/robustness/fuzz/run.py --cases 1000 --seed 7          # others
    python tests/robustness/fuzz/run.py --only chain call              # kinds: chain, rows, block, call

A case that fails is made as simple as it can be, printed and added to corpus.json beside this file: every test run replays it.
The case in progress is in build/fuzz/case.json: where the process dies, that is the one. Exit status: 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(ROOT / "tests/robustness")]
sys.path.remove(str(Path(__file__).parent))

from hypothesis import given, settings  # noqa: E402
from hypothesis import seed as seeded  # noqa: E402

from fuzz import corpus  # noqa: E402
from fuzz.cases import Case, to_json  # noqa: E402
from fuzz.strategies import STRATEGIES, UNHURRIED  # noqa: E402
from res2net_fused.bench.progress import progress  # noqa: E402

IN_PROGRESS = ROOT / "build" / "fuzz" / "case.json"
# Of all cases: chains have the most settings.
SHARES = {"chain": 0.4, "rows": 0.2, "block": 0.2, "call": 0.2}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="how many in all (5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES), metavar="KIND")
    options = parser.parse_args(arguments)
    if options.cases < 1:
        parser.error(f"--cases is {options.cases}; it must be at least 1")
    IN_PROGRESS.parent.mkdir(parents=True, exist_ok=True)
    total = sum(SHARES[kind] for kind in options.only)
    failed = [kind for kind in options.only if not fuzz(kind, round(options.cases * SHARES[kind] / total) or 1, options.seed)]
    print(f"failed: {', '.join(failed)}" if failed else "no case failed")
    return int(bool(failed))


def fuzz(kind: str, cases: int, seed: int) -> bool:
    """Whether all passed."""
    ran: list[Case] = []
    with progress(f"fuzz {kind}, seed {seed}", cases) as bar:

        @seeded(seed)
        @settings(UNHURRIED, max_examples=cases, report_multiple_bugs=False)
        @given(STRATEGIES[kind])
        def run(case: Case) -> None:
            ran[:] = [case]
            IN_PROGRESS.write_text(json.dumps(to_json(case)))
            bar.update()
            case.check()

        try:
            run()
        except Exception as error:  # the last case that ran is the simplest that fails
            traceback.print_exc()
            print(f"\n{json.dumps(to_json(ran[0]))}\nadded to {corpus.FILE.relative_to(ROOT)}", flush=True)
            corpus.add(ran[0], f"{type(error).__name__}: {error}".splitlines()[0])
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
