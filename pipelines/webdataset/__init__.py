"""Web shards: tar archives with an index, written and read by sample index."""
