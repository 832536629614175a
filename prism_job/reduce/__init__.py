"""Shards in, a selection out. numpy and pyarrow; no GPU and no torch."""
