"""Models saved by version 0.1.0 in its first layout, before the modules were moved, still load and compute the same.

The files in tests/support/saved were written by that version: a pickle of two accelerated blocks,
ReferenceBottle2neck(16, 4, scale=4, baseWidth=32) and Bottle2neck(16, 4, scale=3, baseWidth=32), with an input and their
output, and the first block exported.
"""

import pickle
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from tree import TESTS

import res2net_fused as rf
from res2net_fused import _moved

SAVED = TESTS / "support" / "saved"
PICKLE = SAVED / "accelerated_0.1.0.pickle"


@pytest.fixture(scope="module")
def saved():
    return pickle.loads(PICKLE.read_bytes())


def test_an_accelerated_model_loads_and_runs_fused(saved):
    model = saved["model"]
    with torch.no_grad():
        assert_close(model(saved["x"]), saved["y"].double())
    assert all(report.fused for report in rf.explain(model))
    assert type(rf.restore(model)[0]).__module__ == "res2net_fused.modules.reference_blocks"
    again = pickle.loads(pickle.dumps(rf.accelerate(model)))  # under the new names
    with torch.no_grad():
        assert_close(again(saved["x"]), saved["y"].double())


def test_it_loads_in_a_process_that_has_imported_nothing():
    code = "import pickle, sys; found = pickle.load(open(sys.argv[1], 'rb')); import res2net_fused as rf; "
    code += "rf.accelerate(found['model'])"
    subprocess.run([sys.executable, "-c", code, str(PICKLE)], check=True)


def test_an_exported_model_loads(saved):
    program = torch.export.load(SAVED / "exported_0.1.0.pt2")
    first = saved["model"][0]
    assert "res2net_fused" in str(program.graph)
    with torch.no_grad():
        assert_close(program.module()(saved["x"]), first(saved["x"]).double())


@pytest.mark.parametrize("old", _moved.MOVED)
def test_every_old_module_is_there_and_none_is_an_attribute(old):
    module = sys.modules[f"res2net_fused.{old}"]
    with pytest.raises(ImportError, match=rf"res2net_fused\.{old}\.Unheard is nowhere .* state_dict\(\)"):
        module.Unheard  # noqa: B018
    assert module is not getattr(rf, old, None)


def test_a_name_that_is_gone_names_the_remedy():
    gone = b"\x80\x04\x8c\x19res2net_fused.bottle2neck\x8c\x04ReLU\x93."
    with pytest.raises(ImportError, match="load the model with the version that saved it"):
        pickle.loads(gone)
