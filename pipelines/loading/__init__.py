"""Loaders: batches of two crops per image. Free of torch."""

from typing import Literal

BackendName = Literal["native", "ffcv", "dali"]
LoaderName = Literal["auto", "native", "ffcv", "dali"]
