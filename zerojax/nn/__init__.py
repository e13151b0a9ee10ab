"""Flax modules that know ZeRO, and drop-ins for those of Flax and JAX that have a kernel."""

from zerojax.nn import nnx as nnx
from zerojax.nn.functions import softmax as softmax
from zerojax.nn.linen import LayerNorm as LayerNorm
from zerojax.nn.linen import gathered as gathered
