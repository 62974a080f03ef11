"""Collections at work: mixed batches in one model, weights with a task in them, and the engines people already run."""
