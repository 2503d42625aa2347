"""What an encoder has learned: kNN."""
