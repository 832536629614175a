"""Preference, direction, curvature, the sign kernel, ranking, selection. numpy and numba, no torch."""
