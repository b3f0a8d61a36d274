"""What several benchmarks use; no commands."""
