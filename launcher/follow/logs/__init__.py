"""What `prism logs` prints: the lines of many pods, those that exist and those that are gone."""
