"""What a run leaves behind: its folder, checkpoints, metrics, plots and console output."""
