"""What `scripts/benchmark.py` measures with; not part of the product."""
