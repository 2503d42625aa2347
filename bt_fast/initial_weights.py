"""The weights from which a run starts with `--init FILE`: an encoder, and the projector if it fits.

FILE is anything that `bt-fast eval` reads: a run, torchvision's weights, the authors' checkpoints,
files of other programs.
"""

from pathlib import Path

from bt_fast.choices import Stem, is_of_library
from bt_fast.export.encoder_files import Pretrained, read_pretrained
from bt_fast.finite import NotFinite
from bt_fast.models.networks import BarlowTwins


def load_initial_weights(
    model: BarlowTwins, file: Path, *, which: str | None, encoder: str, stem: Stem, size: int
) -> str:
    """Copy the file's weights into the model; returns what was taken and what was not.

    encoder, stem, size: of the model. Raises ValueError if the file has another encoder, or none.
    """
    library = (encoder, size) if is_of_library(encoder) else None
    pretrained = _read(file, which, stem, library)
    wanted = (encoder, stem, size if library else None)
    if (pretrained.architecture, pretrained.stem, pretrained.size) != wanted:
        theirs, ours = (
            f"{name}{f' for {pixels} px' if pixels else f' with the {kind} stem'}"
            for name, kind, pixels in (
                (pretrained.architecture, pretrained.stem, pretrained.size),
                wanted,
            )
        )
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


def _read(file: Path, which: str | None, stem: Stem, library: tuple[str, int] | None) -> Pretrained:
    """The encoder, and its projector unless it has another form than the paper's."""
    known = None if stem == "imagenet" else stem  # weights do not state a 3x3 stem
    try:
        return read_pretrained(file, which=which, stem=known, projector=True, library=library)
    except NotFinite:
        raise
    except ValueError:
        return read_pretrained(file, which=which, stem=known, library=library)
