"""The command `prism`: submits, drives and follows runs. Knows the spec and its errors, nothing else of the job."""
