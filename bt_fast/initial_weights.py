"""The weights from which a run starts with `--init FILE`: an encoder, and the projector if it fits.

FILE is anything that `bt-fast eval` reads: a run, torchvision's weights, the authors' checkpoints,
files of other programs.
"""

from pathlib import Path

from bt_fast.choices import Stem
from bt_fast.export.encoder_files import Pretrained, read_pretrained
from bt_fast.models.networks import BarlowTwins


def load_initial_weights(
    model: BarlowTwins, file: Path, *, which: str | None, encoder: str, stem: Stem
) -> str:
    """Copy the file's weights into the model; returns what was taken and what was not.

    encoder, stem: of the model. Raises ValueError if the file has another encoder, or none.
    """
    pretrained = _read(file, which, stem)
    if (pretrained.architecture, pretrained.stem) != (encoder, stem):
        raise ValueError(
            f"--init {file} holds a {pretrained.architecture} with the {pretrained.stem} stem, the"
            f" run has --encoder {encoder} with the {stem} stem"
        )
    model.encoder.load_state_dict(pretrained.encoder.state_dict())
    if pretrained.projector is None:
        return f"encoder of {pretrained.description}; no projector of this form in it"
    weights = pretrained.projector.state_dict()
    ours = model.projector.state_dict()
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in ours.items()}:
        return f"encoder of {pretrained.description}; its projector has other widths"
    model.projector.load_state_dict(weights)
    return f"encoder and projector of {pretrained.description}"


def _read(file: Path, which: str | None, stem: Stem) -> Pretrained:
    """The encoder, and its projector unless it has another form than the paper's."""
    known = None if stem == "imagenet" else stem  # weights do not state a 3x3 stem
    try:
        return read_pretrained(file, which=which, stem=known, projector=True)
    except ValueError:
        return read_pretrained(file, which=which, stem=known)
