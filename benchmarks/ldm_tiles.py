"""Moved: benchmarks/quality_ldm_tiles.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("quality_ldm_tiles")
