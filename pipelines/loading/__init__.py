"""Loaders: batches of two crops per image. Free of torch."""

from typing import Literal

LoaderName = Literal["auto", "native", "ffcv", "dali"]
