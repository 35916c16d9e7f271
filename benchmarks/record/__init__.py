"""The program that records a GPU: `python benchmarks/record`, or `make record`."""
