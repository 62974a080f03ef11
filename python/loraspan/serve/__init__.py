"""Collections at work: mixed batches in one model, weights with a task in them, and the engines people already run."""

from loraspan.serve.attach import Attached, attach

__all__ = ["Attached", "attach"]
