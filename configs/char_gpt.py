"""A byte-level GPT of 0.8M params on Python's own documentation and source.

    python examples/train_gpt.py --config=configs/char_gpt.py --workdir=runs/char_gpt --config.zero.stage=3

Any device will do; --config.cpu_devices=8 plays eight on a CPU. Beside the keys below it has all of zerojax's own
(`zerojax.config.KEYS`), as --config.precision.params=bfloat16 or --config.optimizer.name=lamb.
"""

import ml_collections
from ml_collections import config_dict

from zerojax import config


def get_config() -> ml_collections.ConfigDict:
    """All values have a type: overrides on the command line are checked against it."""
    c = config.default()
    c.zero.update({"stage": 1, "min_size": 1024, "layerwise": "^(embed|blocks)"})
    c.batch.rows = 32  # of one step, over devices and micro-batches
    c.optimizer.update(
        {
            "name": "adamw",
            "learning_rate": 2e-3,
            "weight_decay": 0.1,
            "decay_only": "(kernel|embedding)$",  # not biases, norms and positions
            "b1": 0.9,
            "b2": 0.95,
            "clip_norm": 1.0,
        }
    )
    c.schedule.update({"name": "cosine", "warmup_num_steps": 50})  # total_num_steps: of the run, below
    c.logging.every = 10
    c.checkpoint.update({"every": 200, "max_to_keep": 2})

    with c.unlocked():
        c.seed = 0
        c.cpu_devices = config_dict.placeholder(int)  # None: the devices there are; a number: as many simulated
        c.model = ml_collections.ConfigDict(
            {
                "vocab": 256,
                "context": 128,
                "layers": 4,
                "heads": 4,
                "width": 128,
                "dtype": "float32",
                "unroll": 1,
                "remat": False,
            }
        )
        c.steps = 1000
        c.eval_every = 200
        c.eval_batches = 4
        c.sample_bytes = 300
    return c
