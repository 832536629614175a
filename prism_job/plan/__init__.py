"""Listed data and spec -> ordered work units with fixed ids, extractor digest. Does not know how many GPUs there are."""
