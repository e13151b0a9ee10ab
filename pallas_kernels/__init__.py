"""Pallas kernels for NVIDIA GPUs; each works on the arrays of one device and knows no mesh."""
