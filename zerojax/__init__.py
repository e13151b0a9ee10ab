"""ZeRO for JAX: optimizer state, gradients and params sharded over a mesh, for any Flax model and Optax optimizer."""

import importlib
from typing import TYPE_CHECKING, Any

from zerojax import schedules as schedules
from zerojax.fused import chain as chain
from zerojax.gather import gather as gather
from zerojax.gather import keep_expensive as keep_expensive
from zerojax.host import Offload as Offload
from zerojax.masters import full_precision as full_precision
from zerojax.masters import master_weights as master_weights
from zerojax.masters import skip_nonfinite as skip_nonfinite
from zerojax.optimizers import fused_adam as fused_adam
from zerojax.optimizers import fused_adamw as fused_adamw
from zerojax.optimizers import fused_lamb as fused_lamb
from zerojax.plan import Memory as Memory
from zerojax.plan import Plan as Plan
from zerojax.plan import make_plan as make_plan
from zerojax.precision import LossScale as LossScale
from zerojax.precision import dynamic_loss_scale as dynamic_loss_scale
from zerojax.precision import static_loss_scale as static_loss_scale
from zerojax.processes import distributed as distributed
from zerojax.states import offload_states as offload_states
from zerojax.states import reload_states as reload_states
from zerojax.step import make_eval_step as make_eval_step
from zerojax.step import make_train_step as make_train_step
from zerojax.step import value_and_grad as value_and_grad
from zerojax.train_state import TrainState as TrainState
from zerojax.train_state import create_train_state as create_train_state
from zerojax.update import apply as apply
from zerojax.zero import zero as zero

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zerojax import config as config
    from zerojax.checkpoint import latest_step as latest_step
    from zerojax.checkpoint import restore_checkpoint as restore_checkpoint
    from zerojax.checkpoint import save_checkpoint as save_checkpoint
    from zerojax.checkpoint import wait_until_finished as wait_until_finished
    from zerojax.data import Dataloader as Dataloader
    from zerojax.engine import Engine as Engine
    from zerojax.engine import initialize as initialize
    from zerojax.weights import export_params as export_params
    from zerojax.weights import import_params as import_params

_LATER = {
    "config": "zerojax.config",
    "latest_step": "zerojax.checkpoint",
    "restore_checkpoint": "zerojax.checkpoint",
    "save_checkpoint": "zerojax.checkpoint",
    "wait_until_finished": "zerojax.checkpoint",
    "Dataloader": "zerojax.data",
    "Engine": "zerojax.engine",
    "initialize": "zerojax.engine",
    "export_params": "zerojax.weights",
    "import_params": "zerojax.weights",
}
"""What needs Flax, ml_collections, Orbax or safetensors: imported where it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'zerojax' has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return module if name == "config" else getattr(module, name)
