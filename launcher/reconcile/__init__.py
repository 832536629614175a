"""Record and observed objects -> actions and status. Pure; the clock is an argument."""
