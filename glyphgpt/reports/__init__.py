"""What people look at: a summary of the model, plots of metrics, the report of a run, and attention maps."""
