"""Moved: benchmarks/quality_versatile_flows.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("quality_versatile_flows")
