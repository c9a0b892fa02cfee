"""Reports: a summary of the model, plots of metrics, the page of a run, and attention maps."""
