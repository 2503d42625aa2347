"""From a folder of images to batches on the training device: formats, order, loaders, views."""

__version__ = "0.2.0"
