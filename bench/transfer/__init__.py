"""The ways to move bytes that bench_transfer.py compares."""
