"""Effective rank of features, and a report on collapse of embeddings.

Rank (Roy & Vetterli 2007; RankMe, Garrido et al., ICML 2023). With the singular values s of the
features [n, D] and p = s / sum(s):

    effective rank = exp(-sum_i p_i log p_i)         between 1 and min(n, D)

RankMe is the effective rank of the uncentred features; that of the centred features is reported
beside it, because a large common mean hides the variation between images.

Collapse. With C the cross-correlation of both views' embeddings over all n images (`loss.py`):

    diagonal      near 1: the views agree; near 0: they do not
    off-diagonal  root mean square; independent dimensions give about 1 / sqrt(n - 1)
    dead          dimensions with a standard deviation below a thousandth of the mean one

In a complete collapse every dimension is dead; in a dimensional collapse the embeddings have a low
rank and a large off-diagonal RMS.
"""

from dataclasses import dataclass

import torch

from bt_fast.loss import correlation_terms, standardise

_DEAD_FRACTION = 1e-3  # of the mean standard deviation


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values; features [n, D]."""
    features = features.double()
    gram = features.T @ features if features.shape[1] <= len(features) else features @ features.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    probabilities = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(probabilities).sum().exp().item()


@dataclass(frozen=True, kw_only=True, slots=True)
class Collapse:
    """Statistics of C and of the embeddings; see the module."""

    num_images: int
    num_dimensions: int
    diagonal_mean: float
    diagonal_spread: float  # standard deviation over the dimensions
    diagonal_lowest: float
    off_diagonal_rms: float
    num_dead: int

    @property
    def rows(self) -> dict[str, str]:
        """Rows of the table."""
        return {
            "diagonal of C": f"{self.diagonal_mean:.3f} ± {self.diagonal_spread:.3f},"
            f" lowest {self.diagonal_lowest:.3f} (identity: 1)",
            "off-diagonal RMS of C": f"{self.off_diagonal_rms:.4f}"
            f" (independent: {(self.num_images - 1) ** -0.5:.4f})",
            "dead dimensions": f"{self.num_dead} of {self.num_dimensions}",
        }


def collapse_report(z_a: torch.Tensor, z_b: torch.Tensor) -> Collapse:
    """Statistics of both views' embeddings of the same images: [n, D] each."""
    num_images, num_dimensions = z_a.shape
    diagonal = (standardise(z_a) * standardise(z_b)).mean(0)
    _, off_diagonal = correlation_terms(z_a, z_b)
    deviation = torch.cat([z_a, z_b]).std(0)
    num_off_diagonal = max(num_dimensions * (num_dimensions - 1), 1)
    return Collapse(
        num_images=num_images,
        num_dimensions=num_dimensions,
        diagonal_mean=diagonal.mean().item(),
        diagonal_spread=diagonal.std(correction=0).item(),
        diagonal_lowest=diagonal.min().item(),
        off_diagonal_rms=(off_diagonal / num_off_diagonal).clamp_min(0).sqrt().item(),
        num_dead=int((deviation <= _DEAD_FRACTION * deviation.mean()).sum()),
    )
