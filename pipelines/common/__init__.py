"""What both command lines share: files that appear whole, flags, signals, console output."""
