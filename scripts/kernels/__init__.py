"""Triton kernels compiled ahead of time: what models launch, and what the compiler makes of it."""
