"""Checks before a run starts: the cluster, the run's needs, its buckets."""
