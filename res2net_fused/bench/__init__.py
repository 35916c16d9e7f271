"""Benchmarks: what is timed (`workloads`), by whom (`providers`), how (`measure`), and what is kept (`results`, `plot`)."""
