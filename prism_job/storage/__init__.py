"""Get, put, list, exists: S3 and local folders, retries, transfers, model files. Does not know what the bytes mean."""
