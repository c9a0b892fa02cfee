"""Inference: load a checkpoint's model, sample text from it, and translate with it."""
