"""Benchmarks against peers, in one run: `python -m tests.bench`. One file per topic; each gives rows."""
