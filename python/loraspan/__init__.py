"""LoRA adapters in one shared low-rank subspace."""
