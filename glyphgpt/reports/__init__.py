"""What people look at: a summary of the model, plots, the run's report, and maps of attention."""
