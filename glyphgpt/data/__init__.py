"""From text to batches: find and read files, tokenize, write and open token shards, and cut training windows."""
