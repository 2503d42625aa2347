"""What a training step costs, counted before it runs."""
