"""A row: a measurement with its settings, and the size at which it runs."""
import importlib
from dataclasses import dataclass, field, replace

import torch

from models import DiT, DiT_models


class NotOnThisDevice(Exception):
    """What a row measures does not exist on this device, or its package is not installed."""


class CheckFailed(Exception):
    """A result is not what it must be. The second argument holds what was measured."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement, which is stored under its name.

    Attributes:
        name (str): What is measured, unique.
        part (str): The section of the documents that it belongs to.
        function (str): "module:function", called as function(scale, **settings) -> dict of plain values.
        settings (dict): Arguments of the function.
        seconds (float): Estimated duration on an H200; a row starts only if that fits into the remaining time.
    """

    name: str
    part: str
    function: str
    settings: dict = field(default_factory=dict)
    seconds: float = 30

    def run(self, scale):
        """Measure, and return plain values.

        Raises:
            NotOnThisDevice: If there is nothing to measure here.
            CheckFailed: If a result is wrong.
        """
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)(scale, **self.settings)


@dataclass(frozen=True)
class Scale:
    """Where and how large rows run: as their settings say, or tiny, to try all of them on any machine."""

    device: str  # "cuda" or "cpu"
    is_tiny: bool = False

    @property
    def is_cuda(self):
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def need_gpu(self, what):
        """Raise `NotOnThisDevice` without a GPU."""
        if not self.is_cuda:
            raise NotOnThisDevice(f"{what} needs a GPU")

    def build(self, model):
        """Return a function that builds a network of `DiT_models` for latents of 256x256 pixels, on the device."""
        def build():
            torch.manual_seed(0)
            if self.is_tiny:
                return DiT(input_size=8, hidden_size=32, depth=2, num_heads=2)
            return DiT_models[model](input_size=32)
        return build

    def network(self, model):
        """Build a network on the device."""
        return self.build(model)().to(self.device)

    def batch(self, size):
        """Return a batch size."""
        return max(2, size // 64) if self.is_tiny else size

    def count(self, number):
        """Return a number of repetitions or steps."""
        return min(number, 3) if self.is_tiny else number

    def compute(self, config, compiles=False):
        """Return a `ComputeConfig`; tiny rows are compiled only if they are about that."""
        return replace(config, compile=False) if self.is_tiny and not compiles else config
