"""The parts of train.py: the run's folder, optimizers, schedule, several processes, evaluation, and metrics."""
