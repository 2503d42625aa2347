"""Evaluations of an encoder: every protocol of the paper, and a few quick ones."""
