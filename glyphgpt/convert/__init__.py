"""From and to what other programs read and write."""
