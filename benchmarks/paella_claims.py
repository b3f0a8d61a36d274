"""Moved: benchmarks/claims_paella.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("claims_paella")
