"""From text to batches: finding and reading files, tokenizing, writing and reading token shards, training windows."""
