"""`bt-fast doctor`: a report on this machine, with a fix for every problem found."""
