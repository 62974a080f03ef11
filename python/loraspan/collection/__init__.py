"""Adapters in a shared subspace, in memory: core space, fits and budgets. No files, no models."""
