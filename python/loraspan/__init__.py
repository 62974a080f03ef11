"""LoRA adapters of one base model in one shared low-rank subspace: compressed fast, rebuilt exactly."""
