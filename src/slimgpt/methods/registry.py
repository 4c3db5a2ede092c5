"""All pruning methods, by name."""

from slimgpt.config import PruneConfig
from slimgpt.methods.base import Method
from slimgpt.methods.compresso import Compresso
from slimgpt.methods.flap import Flap
from slimgpt.methods.loraprune import LoRAPrune
from slimgpt.methods.magnitude import Magnitude
from slimgpt.methods.random import Random
from slimgpt.methods.reap import Reap
from slimgpt.methods.slimgpt import SlimGPT
from slimgpt.methods.taylor import Taylor
from slimgpt.methods.wanda_sp import WandaSP

METHODS: dict[str, type[Method]] = {
    "slimgpt": SlimGPT,
    "magnitude": Magnitude,
    "wanda_sp": WandaSP,
    "flap": Flap,
    "taylor": Taylor,
    "loraprune": LoRAPrune,
    "compresso": Compresso,
    "random": Random,
    "reap": Reap,
}


def make_method(config: PruneConfig) -> Method:
    """Create the method that the options name."""
    return METHODS[config.method](config)
