"""One training with several moving averages of its weights: they only watch, so that one run serves all decays.

    python -m experiments.many_averages REQUEST.json     (the study starts it so)

Seeds, data and losses are those of train.py, and so are the weights and each average: to the last bit, where neither
has --fast, and no gradient is bad (there is no guard against such steps here). Told to stop, it saves all, and a later
start goes on.
"""

import os
import sys

import torch

from autoencoder.vae import load_autoencoder
from common import distributed
from common.checkpoint_io import load_checkpoint, save_checkpoint
from common.compute import DEFAULT_COMPUTE, fastest_config
from common.errors import Stopped, UserError, run_command
from common.seeding import WEIGHTS, BatchRNG, derive_seed
from common.signals import StopSignals
from data import build_dataset
from data.loader import PrefetchLoader
from data.sampler import StepBatchSampler
from diffusion import create_diffusion
from diffusion.timestep_sampler import UniformSampler
from evaluation.classifier import raise_corrupt
from evaluation.records import read_record
from networks import build_dit, model_config
from training.ema import EMA
from training.train_step import TrainingStep


def main():
    request = read_record(sys.argv[1])
    distributed.init()
    with StopSignals() as signals:
        run = AveragedRun(request)
        run.train(signals)


class AveragedRun:
    """Weights, optimiser and averages of a request: network (arguments of `build_dit`), data_path, num_workers, seed,
    batch_size, lr, decays, snapshots (steps after which each average is kept; the last one is the end), fast; and
    folder, save_every (steps), which change nothing of it.
    """

    def __init__(self, request):
        self.request, self.device = request, distributed.device()
        self.state_path = state_of(request["folder"])
        self.lasting = {name: value for name, value in request.items() if name not in ("folder", "save_every")}
        dataset = build_dataset(request["data_path"], request["network"]["input_size"])
        autoencoder = load_autoencoder("none", dataset.channels, self.device)
        torch.manual_seed(derive_seed(request["seed"], WEIGHTS))
        self.model = build_dit(**request["network"]).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=request["lr"], weight_decay=0)
        self.averages = {decay: EMA(self.model, decay) for decay in request["decays"]}
        self.first = self._restore()
        compute = fastest_config(self.device) if request["fast"] else DEFAULT_COMPUTE
        compute.prepare(self.model)
        rows, diffusion = slice(0, request["batch_size"]), create_diffusion("")
        random = BatchRNG(request["seed"], request["batch_size"], rows, self.device)
        self.step = TrainingStep(self.model, autoencoder, diffusion, UniformSampler(diffusion), random, parts=1,
                                 compute=compute)
        self.batches = StepBatchSampler(len(dataset), request["batch_size"], rows, request["seed"], self.first,
                                     max(request["snapshots"]), flips=dataset.flips)
        self.loader = PrefetchLoader(dataset, self.batches, request["num_workers"], self.device, raise_corrupt)

    def train(self, signals):
        """To the last snapshot. Ends by `Stopped`, with all saved, where one of `signals` asked for it."""
        self.model.train()
        for step, (images, labels) in enumerate(self.loader, start=self.first):
            self.step.backward(step, images, labels)
            self.optimizer.step()
            for average in self.averages.values():
                average.update(self.model)
            self.optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done in self.request["snapshots"]:
                self._keep(done)
            if signals.received or done in self.request["snapshots"] or done % self.request["save_every"] == 0:
                self._save(done)
            if signals.received and done < self.batches.last:
                raise Stopped

    def _keep(self, step):
        """Each average as a checkpoint to sample from."""
        for decay, average in self.averages.items():
            save_checkpoint(snapshot(self.request["folder"], step, decay), dict(
                ema=average.model.state_dict(), step=step, config=dict(
                    model=model_config(self.model), image_channels=self.model.in_channels), args=dict(
                    model="DiT-S/2", image_size=self.request["network"]["input_size"], ema_decay=decay, vae="none",
                    num_classes=self.model.config.num_classes)))

    def _save(self, step):
        save_checkpoint(self.state_path, dict(
            request=self.lasting, step=step, model=self.model.state_dict(), opt=self.optimizer.state_dict(),
            averages={str(decay): average.model.state_dict() for decay, average in self.averages.items()}))

    def _restore(self):
        if not os.path.exists(self.state_path):
            return 0
        stored = load_checkpoint(self.state_path)
        self._check(stored.get("request", {}), stored["step"])
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["opt"])
        for decay, average in self.averages.items():
            average.model.load_state_dict(stored["averages"][str(decay)])
        return stored["step"]

    def _check(self, before, step):
        """A `UserError` where the state is of another request; more snapshots may be asked for, of steps to come."""
        changed = [name for name, value in self.lasting.items() if name != "snapshots" and before.get(name) != value]
        kept, wanted = (set(request.get("snapshots", ())) for request in (before, self.lasting))
        if wanted - kept and min(wanted - kept) <= step:
            changed.append("snapshots")
        if changed:
            raise UserError(f"{self.state_path} is of a training with other {', '.join(changed)}: remove it, or take "
                            "another --work")


def state_of(folder):
    """Where the training is kept to go on with."""
    return os.path.join(folder, "state.pt")


def snapshot(folder, step, decay):
    """Where the average of a decay is kept, as it was after so many steps."""
    return os.path.join(folder, f"{step:07d}-decay-{decay:g}.pt")


if __name__ == "__main__":
    run_command(main)
