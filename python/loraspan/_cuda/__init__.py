"""The compiled CUDA kernels: tables of rows and jobs for them, and their library, opened when a call first asks."""
