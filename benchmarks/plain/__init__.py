"""Straightforward forms of what the package does faster, written from the equations: peers for the benchmarks."""
