"""Torch's random numbers on a CPU, by NumPy's Mersenne Twister: the inputs of runs that were made with torch."""

import numpy as np


class TorchGenerator:
    """`torch.Generator().manual_seed(seed)`; checked by the golden values that its numbers lead to."""

    def __init__(self, seed):
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed)

    def rand(self, count):
        return (self._bits.random_raw(count) & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    def randn(self, *shape):
        """`torch.randn(*shape)`, of 16 elements or more: Box-Muller on each 16, the last 16 anew where they overlap."""
        count = int(np.prod(shape))
        x = self.rand(count)
        for i in range(0, count - 15, 16):
            x[i : i + 16] = _box_muller(x[i : i + 16])
        if count % 16:
            x[-16:] = _box_muller(self.rand(16))
        return x.reshape(shape)

    def linear(self, fan_in, fan_out):
        """Kernel [fan_in, fan_out], as Flax has it, and bias of a new `torch.nn.Linear`."""
        bound = np.float32(fan_in**-0.5)
        draw = lambda *shape: (self.rand(int(np.prod(shape))) * (2 * bound) - bound).reshape(shape)
        return {"kernel": draw(fan_out, fan_in).T.copy(), "bias": draw(fan_out)}


def _box_muller(uniform):
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:8].astype(np.float64))), 2 * np.pi * uniform[8:].astype(np.float64)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
