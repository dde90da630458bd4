"""What several ranks cost, and how exact they are: `python -m benchmarks.ranks`."""
