"""Runs the stages as processes on this machine."""
