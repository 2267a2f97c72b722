"""Training: models over many ranks, runs that resume, and what a run will cost."""
