"""The host of the reconcile loop: work queue, informer, leader election, health, metrics."""
