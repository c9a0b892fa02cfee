"""From a checkpoint to text: load a model, sample, and search."""
