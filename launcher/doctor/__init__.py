"""Checks before a run starts: the cluster, what the run needs, its buckets."""
