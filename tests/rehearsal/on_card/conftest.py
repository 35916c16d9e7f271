"""Tests on the stand-in card: collected only by the processes that have it, which tests/rehearsal/test_rehearsals.py starts."""

import os

if not os.environ.get("STAND_IN_CARD"):
    collect_ignore_glob = ["test_*.py"]
