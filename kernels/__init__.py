"""Fused kernels, formats and their plain PyTorch reference."""
