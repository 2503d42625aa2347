"""bt-fast: Barlow Twins pretraining as fast as the hardware allows."""

from typing import TYPE_CHECKING

from pipelines import __version__

if TYPE_CHECKING:
    from bt_fast.export.encoder_files import load_encoder

__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str):
    """`load_encoder` on first use: `import bt_fast` need not wait for torch."""
    if name == "load_encoder":
        from bt_fast.export.encoder_files import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
