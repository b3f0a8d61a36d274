"""Moved: benchmarks/speed_versatile.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("speed_versatile")
