"""The commands of the GPU program on stand-in cards, from their command lines to the files that they leave."""

import json
import subprocess
import sys

import numpy
import pytest
from PIL import Image
from test_rehearsals import HERE, card

from res2net_fused.bench import results

ROOT = HERE.parent
RF = "-m", "res2net_fused"
RECORD = (str(ROOT / "benchmarks" / "record.py"),)
# Cut to the batch of 1, while plans and tiles see 32.
CUT = {"batch": 32}
on_cards = pytest.mark.parametrize("name", ["H100", "RTX4090"])


def run(name, *arguments, faults=(), expected=0, folder=None, timeout=600, **settings):
    """A command on two stand-in cards; its output."""
    env = card.environment(card.Settings(name, count=2, **settings), json.dumps(faults))
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=folder or ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == expected, f"exit status {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def opened(folder, stem="bench-cuda"):
    """The rows of a result file, whose plot shows something in every panel."""
    data = results.read(folder / f"{stem}.json")
    picture = numpy.asarray(Image.open(folder / f"{stem}.png").convert("L"))
    assert picture.shape[0] > 200 and picture.std() > 5
    return data


@on_cards
def test_rehearsed_info_names_the_card_and_what_can_run(name):
    text = run(name, *RF, "info", "--device", "cuda:1")
    assert card.CARDS[name].name in text
    assert "can run" in text.split("triton")[1].splitlines()[0]


@on_cards
def test_rehearsed_check_is_green(name):
    text = run(name, *RF, "check", "--quick", "--configs", "26w4s", "--device", "cuda:1")
    assert " 0 misses" in text and "triton" in text and "MISS" not in text
