"""`bt-fast doctor`: what this machine has, and what to fix."""
