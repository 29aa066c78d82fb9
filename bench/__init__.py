"""Benchmarks against limits and peers: they print ratios, and write what they measured as JSON."""
