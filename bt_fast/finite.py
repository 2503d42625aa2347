"""Numbers that are not finite, found on the device that holds them."""

from collections.abc import Callable, Mapping

import torch


class NotFinite(ValueError):
    """A tensor that must be finite is not."""


@torch.no_grad()
def queue_finite_check(
    tensors: Mapping[str, torch.Tensor], source: str, way_out: str
) -> Callable[[], None]:
    """Queue a check that all values are finite, without waiting for the device.

    Call the result when the queued work has completed: it raises NotFinite, one line with the
    source, its first tensor with a value that is NaN or infinite, and the way out.
    """
    names, finite = _are_finite(tensors)
    on_host = finite.to("cpu", non_blocking=True)  # page-locked if it comes from a GPU
    return lambda: _require(names, on_host, source, way_out)


@torch.no_grad()
def require_finite(tensors: Mapping[str, torch.Tensor], source: str, way_out: str) -> None:
    """Raise NotFinite now unless all values are finite; see `queue_finite_check`."""
    _require(*_are_finite(tensors), source, way_out)


def _are_finite(tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], torch.Tensor]:
    """Names of the tensors that may be not finite, and whether they are: bool, on their device."""
    values = {k: t for k, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not values:
        return [], torch.empty(0, dtype=torch.bool)
    # The largest magnitude is not finite if any value is not; unlike isfinite, it takes no memory.
    largest = torch._foreach_norm(list(values.values()), torch.inf)
    return list(values), torch.stack(largest).isfinite()


def _require(names: list[str], finite: torch.Tensor, source: str, way_out: str) -> None:
    for name, is_finite in zip(names, finite.tolist(), strict=True):  # waits for a GPU
        if not is_finite:
            raise NotFinite(f"{source}: values of {name} are not finite; {way_out}")
