"""What benchmarks/speed.py measures, a section per file."""
