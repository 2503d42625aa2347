"""Shared by both command lines: atomic files, flags, signals, console output, core count."""
