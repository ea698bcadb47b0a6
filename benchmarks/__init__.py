"""Measured comparisons with a native model of equal weights; ``python -m benchmarks.run`` takes them all."""
