"""What a training run consists of, as one checkpoint."""

import os

import torch

from common.checkpoint_io import CHECKPOINT_NAME, load_checkpoint, load_weights
from common.errors import UserError
from networks import model_config
from training.fsdp import full_tensor, is_sharded, shard_like

# Flags that do not change what is computed: a resumed run may have others without a word.
CHANGEABLE_FLAGS = {"resume", "results_dir", "epochs", "max_steps", "num_workers", "log_every", "ckpt_every", "sample_every",
              "grad_accum_steps", "features_in_memory", "max_bad_images", "override", "keep_checkpoints", "keep_every",
              "async_save", "timeout", "max_bad_steps"}
# Where the data lie may change: what they are is in the configuration.
CHANGEABLE_FLAGS |= {"data_path", "features_path", "vae"}
# How fast, not what; other rounding is as welcome as another GPU's. (Another precision is not.)
CHANGEABLE_FLAGS |= {"fast", "compile", "cuda_graphs", "attention", "fused_adamw", "grad_checkpointing", "fsdp"}
# Evaluation only watches.
CHANGEABLE_FLAGS |= {"eval_every", "eval_samples", "eval_reference", "eval_features", "eval_cfg_scale", "eval_sampling_steps"}


class TrainState:
    """Model, EMA, optimiser, timestep sampler and `NonFiniteGuard` of a run, with what its checkpoints say of themselves.

    model   the bare DiT, its weights the same on every process, or sharded; `ema` and the optimiser likewise
    args    the command's flags, a plain dictionary
    config  what is needed beside them to build the model again, and to know the data: image_channels, class_names,
            num_images, latents (what makes them what they are)
    """

    def __init__(self, model, optimizer, schedule_sampler, guard, ema, args, config):
        self.model, self.optimizer, self.schedule_sampler, self.guard = model, optimizer, schedule_sampler, guard
        self.ema, self.args, self.config = ema, args, config | dict(model=model_config(model))

    @property
    def is_sharded(self):
        """Whether `values` and `copy` are to be called by all processes; what they return is for the main one."""
        return is_sharded(self.model)

    def values(self, step):
        """What a checkpoint holds after `step` optimiser steps; the tensors are the living ones, unless sharded."""
        return self.copy(step) if self.is_sharded else self._living(step)

    def _living(self, step):
        return dict(model=self.model.state_dict(), ema=self.ema.model.state_dict(), opt=self.optimizer.state_dict(),
                    args=self.args, config=self.config, step=step, schedule_sampler=self.schedule_sampler.state_dict(),
                    guard=self.guard.state_dict())

    def copy(self, step):
        """The same as copies in host memory, which training does not change any more."""
        return _copy_to_host(self._living(step), not self.is_sharded or torch.distributed.get_rank() == 0)

    def restore(self, path, override=False):
        """Go on from a checkpoint; returns its step, and sentences on what is otherwise than it was then.

        override  accept that flags which change what is computed have other values
        raise     UserError where they have, where it is of another model, or holds no training state
        """
        stored = load_checkpoint(path)
        try:
            return self._restore(stored, path, override)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise UserError(f"--resume {path}: this is no training state of this code ({reason})") from None

    def _restore(self, stored, path, override):
        missing = [name for name in ("model", "ema", "opt", "args") if name not in stored]
        if missing:
            raise UserError(f"--resume {path}: this file has no {', '.join(missing)}; "
                            "it may do to sample from, not to go on training")
        step = stored["step"] if "step" in stored else _step_in_name(path)
        if type(step) is not int or not 0 <= step < 2**62:
            raise ValueError(f"step is {step!r}")
        self._check_model(stored.get("config", {}).get("model") or {}, path)
        changes = self._changes(stored)
        if changes and not override:
            raise UserError(f"--resume {path}: {'; '.join(changes)}. Another value makes another run: give the old "
                            "one, or pass --override")
        for model, name in ((self.model, "model"), (self.ema.model, "ema")):
            load_weights(model, _shard_state_like(model.state_dict(), stored[name]), path)
        for part, name in ((self.schedule_sampler, "schedule_sampler"), (self.guard, "guard")):
            if stored.get(name):
                part.load_state_dict(stored[name])
        self._restore_optimizer(stored["opt"], is_fresh=step <= self.guard.total)
        return step, changes

    def _restore_optimizer(self, stored, is_fresh):
        """The moments; how it steps (learning rate, betas ...) is said by the flags. is_fresh: no step was applied."""
        settings = [{name: value for name, value in group.items() if name != "params"}
                    for group in self.optimizer.param_groups]
        if self.is_sharded:
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            stored = stored | dict(state={i: _shard_state_like(dict.fromkeys(moments, weights[i]), moments)
                                          for i, moments in stored["state"].items()})
        # It is the group's settings that say on which device a moment belongs.
        groups = [group | own for group, own in zip(stored["param_groups"], settings, strict=True)]
        self.optimizer.load_state_dict(stored | dict(param_groups=groups))
        for name, weight in self.model.named_parameters():
            moments = self.optimizer.state.get(weight, {})
            if (is_fresh and not moments) or not weight.requires_grad:
                continue
            shapes = {key: tuple(moments[key].shape) for key in ("exp_avg", "exp_avg_sq", "step")}
            if shapes != dict(exp_avg=tuple(weight.shape), exp_avg_sq=tuple(weight.shape), step=()):
                raise ValueError(f"the optimiser's moments of {name} have the shapes {shapes}")
            if not all(torch.is_floating_point(value) for value in moments.values()):
                raise ValueError(f"the optimiser's moments of {name} are no floating-point numbers")
            if not moments["step"] >= 0:
                raise ValueError(f"the optimiser made {float(moments['step'])} steps with {name}")

    def _changes(self, stored):
        """Sentences on flags and data that are not those of the checkpoint."""
        args, config = stored["args"], stored.get("config", {})
        then = args if isinstance(args, dict) else vars(args)
        changed = [f"--{name.replace('_', '-')} is {self.args[name]}, it was {then[name]}" for name in self.args
                   if name in then and name not in CHANGEABLE_FLAGS and then[name] != self.args[name]]
        return changed + [f"the data have {name.replace('_', ' ')} {_short(self.config[name])}, they had "
                          f"{_short(config[name])}" for name in ("num_images", "class_names", "latents")
                          if name in config and config[name] != self.config[name]]

    def _check_model(self, config, path):
        config = dict(conditioning="adaln-zero") | config  # the one block type before checkpoints named it
        differing = {name: value for name, value in config.items() if value != self.config["model"].get(name)}
        if differing:
            was = ", ".join(f"{name}={value}" for name, value in differing.items())
            now = ", ".join(f"{name}={self.config['model'].get(name)}" for name in differing)
            raise UserError(f"--resume {path}: this checkpoint is of another model ({was}; the flags give {now})")


def _copy_to_host(values, keep=True):
    """The same in host memory, sharded tensors put together; keep=False: only help the others with those."""
    if torch.is_tensor(values):
        values = full_tensor(values.detach())
        return values.to("cpu", copy=True) if keep else None
    if isinstance(values, dict):
        return {name: _copy_to_host(value, keep) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_copy_to_host(value, keep) for value in values)
    return values


def _shard_state_like(patterns, tensors):
    """{name: whole tensor} as sharded ones like those of `patterns`, where these are sharded."""
    return {name: shard_like(patterns.get(name), value) for name, value in tensors.items()}


def _short(value):
    if isinstance(value, dict):
        return ", ".join(f"{name}={str(part)[:12]}" for name, part in value.items())
    return f"{value[:3]}..." if isinstance(value, list) and len(value) > 3 else value


def _step_in_name(path):
    match = CHECKPOINT_NAME.fullmatch(os.path.basename(path))
    if match is None:
        raise UserError(f"--resume {path}: the file does not say its step, and neither does its name (0050000.pt)")
    return int(match[1])
