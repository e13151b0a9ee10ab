"""Flax Linen modules that know ZeRO, and functions and layers over `pallas_kernels`."""

from zerojax.nn.functions import softmax as softmax
from zerojax.nn.linen import gathered as gathered
