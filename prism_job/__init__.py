"""The job that runs in the container: plan, extract, reduce. Knows nothing of the launcher or of Kubernetes."""

__version__ = "0.1.0"
