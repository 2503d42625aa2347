"""bt-fast: Barlow Twins pretraining as fast as the hardware allows.

    pretrain(recipe="cifar10", data=...)    train an encoder -> Run (path, encoder, metrics)
    embed(path, data, out=...)              features of a data set -> file
    load_encoder(path)                      images [n, 3, H, W] -> features [n, width]
    barlow_twins_loss(z_a, z_b)             embeddings [n, D] of both views -> scalar
    LARS(params, lr)                        the paper's optimizer
    TwoViewAugment()                        crops uint8 [2, n, h, w, 3] -> views [2 n, 3, h, w]
    open_loader(name, dataset, crop, ...)   batches of two crops per image
    open_data(path)                         a `.beton`, or a folder of web shards

Names are imported on first use: `import bt_fast` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipelines import __version__

if TYPE_CHECKING:
    from bt_fast.api import Run, pretrain
    from bt_fast.config import Config
    from bt_fast.evaluate.embed import embed
    from bt_fast.export.encoder_files import load_encoder
    from bt_fast.lars import LARS
    from bt_fast.loss import barlow_twins_loss
    from bt_fast.two_view_augment import TwoViewAugment
    from pipelines.branches import VIEW_A, VIEW_B, Branch
    from pipelines.crop import RandomResizedCrop
    from pipelines.loading.choose import open_loader
    from pipelines.loading.datasets import open_data
    from pipelines.loading.loader import Batch, Loader

_MODULES = {
    "Batch": "pipelines.loading.loader",
    "Branch": "pipelines.branches",
    "Config": "bt_fast.config",
    "LARS": "bt_fast.lars",
    "Loader": "pipelines.loading.loader",
    "RandomResizedCrop": "pipelines.crop",
    "Run": "bt_fast.api",
    "TwoViewAugment": "bt_fast.two_view_augment",
    "VIEW_A": "pipelines.branches",
    "VIEW_B": "pipelines.branches",
    "barlow_twins_loss": "bt_fast.loss",
    "embed": "bt_fast.evaluate.embed",
    "load_encoder": "bt_fast.export.encoder_files",
    "open_data": "pipelines.loading.datasets",
    "open_loader": "pipelines.loading.choose",
    "pretrain": "bt_fast.api",
}
__all__ = [  # noqa: RUF022 (in the order of help)
    "pretrain",
    "Run",
    "Config",
    "load_encoder",
    "embed",
    "barlow_twins_loss",
    "LARS",
    "TwoViewAugment",
    "Branch",
    "VIEW_A",
    "VIEW_B",
    "open_data",
    "open_loader",
    "Loader",
    "Batch",
    "RandomResizedCrop",
    "__version__",
]


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return getattr(importlib.import_module(_MODULES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]
