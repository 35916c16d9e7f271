"""Taking over the blocks of a model that somebody already has: recognising, swapping classes, explaining."""
