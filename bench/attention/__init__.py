"""The parts of bench_attention.py."""
