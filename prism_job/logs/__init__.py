"""Logs of pods beside the output of their run: kept while a stage runs, read back when its pod is gone."""
