"""Bytes and the names they lie under. Not: torch, scores, Kubernetes."""
