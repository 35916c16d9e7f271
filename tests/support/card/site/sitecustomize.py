"""Imported by every Python process that has this folder on its path: gives it the stand-in card that STAND_IN_CARD names."""

import os

if os.environ.get("STAND_IN_CARD"):
    import card

    card.insert(card.Settings.of(os.environ["STAND_IN_CARD"]))
