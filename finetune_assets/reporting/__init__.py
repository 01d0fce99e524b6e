"""Report on experiments and their latest runs, read from the store alone."""
