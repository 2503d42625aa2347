"""The weights from which a run starts with `--init FILE`: an encoder, and the projector if it fits.

FILE is anything that `bt-fast eval` reads: a run, torchvision's weights, the authors' checkpoints,
files of other programs.
"""

import functools
from pathlib import Path

from bt_fast.choices import is_of_library
from bt_fast.config import Config
from bt_fast.export.encoder_files import Pretrained, read_pretrained
from bt_fast.finite import NotFinite
from bt_fast.models.networks import BarlowTwins


def load_initial_weights(model: BarlowTwins, file: Path, config: Config) -> str:
    """Copy the file's weights into the configured model; returns what was taken and what was not.

    Raises ValueError if the file has another encoder, or none.
    """
    pretrained = _read(file, config)
    ours = _form(config.encoder, config.stem, config.size if is_of_library(config.encoder) else 0)
    theirs = _form(pretrained.architecture, pretrained.stem, pretrained.size or 0)
    if theirs != ours:
        raise ValueError(f"--init {file} holds a {theirs}, the run has --encoder {ours}")
    model.encoder.load_state_dict(pretrained.encoder.state_dict())
    if pretrained.projector is None:
        return f"encoder of {pretrained.description}; no projector of this form in it"
    weights = pretrained.projector.state_dict()
    our_weights = model.projector.state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in our_weights.items()}:
        return f"encoder of {pretrained.description}; its projector has other widths"
    model.projector.load_state_dict(weights)
    return f"encoder and projector of {pretrained.description}"


def _form(architecture: str, stem: str, size: int) -> str:
    return f"{architecture} for {size} px" if size else f"{architecture} with the {stem} stem"


def _read(file: Path, config: Config) -> Pretrained:
    """The encoder, and its projector unless it has another form than the paper's."""
    stem = None if config.stem == "imagenet" else config.stem  # weights do not state a 3x3 stem
    library = (config.encoder, config.size) if is_of_library(config.encoder) else None
    read = functools.partial(read_pretrained, file, which=config.which, stem=stem, library=library)
    try:
        return read(projector=True)
    except NotFinite:
        raise
    except ValueError:
        return read()
