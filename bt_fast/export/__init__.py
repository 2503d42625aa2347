"""Encoders read from files, and written for other libraries."""
