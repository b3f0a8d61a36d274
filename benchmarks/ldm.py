"""Moved: benchmarks/speed_ldm.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("speed_ldm")
