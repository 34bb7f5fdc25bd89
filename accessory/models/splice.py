"""Writing feature vectors into a sequence at placeholder positions, and reading states back out."""

from torch import Tensor


def splice(x: Tensor, where: Tensor, features: Tensor, name: str = "image") -> Tensor:
    """Overwrite the positions ``where`` (B, T) of ``x`` (B, T, D) with ``features`` (M, D) in reading order.

    Raises:
        ValueError: when the number of placeholders is not the number of features; both are named. Going on would
            shift every later picture by the difference and train on nonsense.
    """
    wanted = int(where.sum())
    if wanted != features.shape[0]:
        raise ValueError(
            f"{wanted} <{name}> placeholders stand in the batch, but there are {features.shape[0]} features"
        )
    if wanted == 0:
        # The zero-weight term keeps the parameters behind the features in the graph on text-only ranks, so that
        # every rank runs the same collectives.
        return x + features.sum().to(x.dtype) * 0
    return x.masked_scatter(where[..., None], features.to(x.dtype))


def gather(h: Tensor, where: Tensor) -> Tensor:
    """States (M, D) at the positions ``where`` (B, T) of ``h`` (B, T, D), in reading order."""
    return h[where]
