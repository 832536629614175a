"""The command `prism`: sees prism_job.spec and prism_job.errors, and starts everything else as a process."""
