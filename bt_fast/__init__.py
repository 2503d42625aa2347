"""bt-fast: Barlow Twins pretraining as fast as the hardware allows."""

from pipelines import __version__

__all__ = ["__version__"]
