"""The native libraries: how they are built, found and loaded, and what the machine offers. Knows no chain."""
