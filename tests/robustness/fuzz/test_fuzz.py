"""Some random cases of every kind, the same each time, and all that fuzzing ever found; `make fuzz` runs more."""

import json

import pytest
from hypothesis import given, settings

from fuzz import corpus, odd
from fuzz.cases import KINDS, from_json, to_json
from fuzz.strategies import STRATEGIES, UNHURRIED, blocks, calls, chains, rows

FOUND = corpus.load()


def some(cases: int):
    return settings(UNHURRIED, max_examples=cases, derandomize=True)


@some(50)
@given(chains())
def test_chains(case):
    case.check()


@some(60)
@given(rows())
def test_rows(case):
    case.check()


@some(30)
@given(blocks())
def test_blocks(case):
    case.check()


@some(150)
@given(calls())
def test_calls(case):
    case.check()


@pytest.mark.parametrize("operator", odd.ODD)
def test_every_odd_argument(operator):
    for name, kinds in odd.ODD[operator].items():
        for kind in kinds:
            odd.check(operator, {name: kind})


@pytest.mark.parametrize("case", [case for _, case in FOUND], ids=[why for why, _ in FOUND])
def test_what_was_found_stays_right(case):
    case.check()


@some(20)
@given(chains(), rows(), blocks(), calls())
def test_cases_survive_a_file(chain, row, block, call):
    for case in (chain, row, block, call):
        assert from_json(json.loads(json.dumps(to_json(case)))) == case
    assert set(KINDS) == set(STRATEGIES)


def test_a_case_is_added_once(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FILE", tmp_path / "corpus.json")
    corpus.FILE.write_text("[]")
    (_, case), *_ = FOUND
    assert corpus.add(case, "found today") and not corpus.add(case, "found again")
    assert corpus.load() == [("found today", case)]


def test_a_wrong_result_is_found(monkeypatch):
    """Otherwise nothing above could fail: one value of the output is off."""
    from res2net_fused.backends.reference import BACKEND as reference_backend

    right = reference_backend.forward

    def wrong(*arguments):
        out = right(*arguments)
        out[0, 0, 0, 0] += 1e-2 * out.norm()
        return out

    monkeypatch.setattr(reference_backend, "forward", wrong)
    case = KINDS["chain"]({}, 2, 4, (1, 5, 6), "float32")
    with pytest.raises(AssertionError, match="reference: result 0 is off by"):
        case.check(["reference"])
