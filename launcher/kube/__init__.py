"""The only room that imports kubernetes: transport, credentials, errors, streams."""
