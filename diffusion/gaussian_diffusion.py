"""The class behind `create_diffusion`."""
from .objectives import Objectives
from .process import Process
from .samplers import Samplers


class GaussianDiffusion(Process, Samplers, Objectives):
    """A diffusion process with its samplers and losses.

    `process.py` holds the tables and the one-step distributions, `samplers.py` DDPM and DDIM, `objectives.py` the
    training losses and bits per dimension. `create_diffusion` builds one.
    """
