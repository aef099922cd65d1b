"""One command for each question; see `docs/benchmarks.md`."""
