"""Random calls of all there is to call: `strategies.py` draws cases, `cases.py` checks one, `corpus.json` has those found."""
