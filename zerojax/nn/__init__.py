"""Flax modules and module transforms."""

from zerojax.nn.linen import gathered as gathered
