"""What scripts/check.py looks at."""
