"""Moved: benchmarks/quality_paella_prompts.py."""

from parts.moved import run_as

if __name__ == "__main__":
    run_as("quality_paella_prompts")
