"""Output of a run: directory, checkpoints, metrics, plots, console."""
