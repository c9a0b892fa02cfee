"""What train.py builds on: the run's folder, optimizers, schedule, several processes, evaluation, and metrics."""
