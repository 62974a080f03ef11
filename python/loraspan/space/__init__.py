"""A collection as a user holds it."""

from loraspan.space.subspace import Subspace

__all__ = ["Subspace"]
