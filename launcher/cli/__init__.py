"""Typer: verbs, options, exit codes; no logic."""
