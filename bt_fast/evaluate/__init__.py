"""What an encoder has learned: every protocol of the paper, and a few quick ones."""
