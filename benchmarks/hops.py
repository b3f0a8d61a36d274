"""Moved: benchmarks/reading_hops.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("reading_hops")
