"""How much of their dimensions features use, and how far embeddings are from collapse.

Rank (Roy & Vetterli 2007; RankMe, Garrido et al., ICML 2023). With the singular values s of the
features [n, D] and p = s / sum(s):

    effective rank = exp(-sum_i p_i log p_i)         between 1 and min(n, D)

RankMe is this number of the features as they are; the effective rank reported beside it is that of
the centred features, so that a large common mean does not hide what varies.

Collapse. With C the cross-correlation of both views' embeddings over all n images (`loss.py`):

    diagonal      near 1: the views agree; near 0: they do not
    off-diagonal  root mean square; independent dimensions give about 1 / sqrt(n)
    dead          dimensions whose deviation is below a thousandth of the mean one

A complete collapse has every dimension dead; a dimensional one has a low rank of the embeddings and
a large off-diagonal RMS.
"""

from dataclasses import dataclass

import torch

from bt_fast.loss import correlation_terms, standardise

_DEAD = 1e-3


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the singular values' shares; features [n, D]."""
    features = features.double()
    smaller = features.T @ features if features.shape[1] <= len(features) else features @ features.T
    values = torch.linalg.eigvalsh(smaller).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


def centred_rank(features: torch.Tensor) -> float:
    """`effective_rank` of what varies between the images."""
    return effective_rank(features - features.mean(0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Collapse:
    """What C says; see the module."""

    num_images: int
    num_dimensions: int
    diagonal_mean: float
    diagonal_spread: float  # standard deviation over the dimensions
    diagonal_lowest: float
    off_diagonal_rms: float
    num_dead: int

    @property
    def rows(self) -> dict[str, str]:
        """For a table."""
        return {
            "diagonal of C": f"{self.diagonal_mean:.3f} ± {self.diagonal_spread:.3f},"
            f" lowest {self.diagonal_lowest:.3f} (identity: 1)",
            "off-diagonal RMS of C": f"{self.off_diagonal_rms:.4f}"
            f" (independent: {self.num_images**-0.5:.4f})",
            "dead dimensions": f"{self.num_dead} of {self.num_dimensions}",
        }


def collapse_report(z_a: torch.Tensor, z_b: torch.Tensor) -> Collapse:
    """From the embeddings of both views of the same images: [n, D] each."""
    num_images, num_dimensions = z_a.shape
    diagonal = (standardise(z_a) * standardise(z_b)).mean(0)
    _, off_diagonal = correlation_terms(z_a, z_b)
    deviation = torch.cat([z_a, z_b]).std(0)
    pairs = max(num_dimensions * (num_dimensions - 1), 1)
    return Collapse(
        num_images=num_images,
        num_dimensions=num_dimensions,
        diagonal_mean=diagonal.mean().item(),
        diagonal_spread=diagonal.std(correction=0).item(),
        diagonal_lowest=diagonal.min().item(),
        off_diagonal_rms=(off_diagonal / pairs).clamp_min(0).sqrt().item(),
        num_dead=int((deviation <= _DEAD * deviation.mean()).sum()),
    )
