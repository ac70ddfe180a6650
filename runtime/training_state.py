"""What a training run consists of, as one checkpoint."""
import os

from . import checkpoint
from .ema import EMA
from .errors import UserError

# Flags that do not change what is computed: a resumed run may have others without a word.
FREE_FLAGS = {"resume", "results_dir", "epochs", "max_steps", "num_workers", "log_every", "ckpt_every", "sample_every",
              "grad_accum_steps", "features_in_memory", "max_bad_images"}


class TrainingState:
    """Model, EMA, optimiser and timestep sampler of a run, with what its checkpoints say of themselves.

    model   the bare DiT, its weights the same on every process
    args    the command's flags, a plain dictionary
    config  what is needed beside them to build the model again: image_channels, class_names
    """

    def __init__(self, model, optimizer, schedule_sampler, ema_decay, args, config):
        self.model, self.optimizer, self.schedule_sampler = model, optimizer, schedule_sampler
        self.ema = EMA(model, ema_decay)
        self.args, self.config = args, config | dict(model=model.config)

    def save(self, path, step):
        """Write a checkpoint of the state after `step` optimiser steps."""
        checkpoint.save(path, dict(
            model=self.model.state_dict(), ema=self.ema.model.state_dict(), opt=self.optimizer.state_dict(),
            args=self.args, config=self.config, step=step, schedule_sampler=self.schedule_sampler.state_dict()))

    def restore(self, path):
        """Go on from a checkpoint; returns its step, and sentences on flags that have another value than then.

        raise  UserError where it is of another model, or holds no training state
        """
        stored = checkpoint.load(path)
        missing = [name for name in ("model", "ema", "opt", "args") if name not in stored]
        if missing:
            raise UserError(f"--resume {path}: this file has no {', '.join(missing)}; "
                            "it may do to sample from, not to go on training")
        then = stored["args"] if isinstance(stored["args"], dict) else vars(stored["args"])
        self._check_model(stored.get("config", {}).get("model"), path)
        checkpoint.load_weights(self.model, stored["model"], path)
        checkpoint.load_weights(self.ema.model, stored["ema"], path)
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(stored["opt"])
        for group, lr in zip(self.optimizer.param_groups, learning_rates):
            group["lr"] = lr  # the flag decides
        if stored.get("schedule_sampler"):
            self.schedule_sampler.load_state_dict(stored["schedule_sampler"])
        changed = [f"--{name.replace('_', '-')} is {self.args[name]}, it was {then[name]}" for name in self.args
                   if name in then and name not in FREE_FLAGS and then[name] != self.args[name]]
        return stored["step"] if "step" in stored else _step_in_name(path), changed

    def _check_model(self, config, path):
        differing = {name: value for name, value in (config or {}).items() if value != self.model.config.get(name)}
        if differing:
            was = ", ".join(f"{name}={value}" for name, value in differing.items())
            now = ", ".join(f"{name}={self.model.config.get(name)}" for name in differing)
            raise UserError(f"--resume {path}: this checkpoint is of another model ({was}; the flags give {now})")


def _step_in_name(path):
    match = checkpoint.CHECKPOINT_NAME.fullmatch(os.path.basename(path))
    if match is None:
        raise UserError(f"--resume {path}: the file does not say its step, and neither does its name (0050000.pt)")
    return int(match[1])
