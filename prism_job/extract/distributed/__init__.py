"""Several ranks: the DeepSpeed world, the rank spawner, the watchdog."""
