"""The parts of a training run as a `CheckpointManager` saves them, and what must not change when it is resumed."""
from collections.abc import Mapping

import numpy as np
import torch

from common.cli import flag_name
from common.errors import UserError
from common.state_dicts import is_finite, load_weights, unwrap_state_dict
from training.fsdp import shard_like

# Flags that a resumed run may change silently. Loop lengths, logs, storage and retention:
CHANGEABLE_FLAGS = {"resume", "results_dir", "epochs", "max_steps", "num_workers", "log_every", "ckpt_every",
                    "sample_every", "grad_accum_steps", "cache_on_device", "max_bad_images", "allow_config_change",
                    "keep_checkpoints", "keep_every", "async_save", "dist_timeout", "max_bad_steps"}
# Where the data are (what they are is compared by the configuration):
CHANGEABLE_FLAGS |= {"data_path", "features_path", "vae"}
# How fast, not what: another rounding is as acceptable as that of another GPU. (Another precision is not.)
CHANGEABLE_FLAGS |= {"fast", "compile", "cuda_graphs", "attention", "fused_adamw", "grad_checkpointing", "fsdp"}
# Evaluation only observes:
CHANGEABLE_FLAGS |= {"eval_every", "eval_samples", "eval_reference", "eval_features", "eval_cfg_scale",
                     "eval_sampling_steps"}

HYPERPARAMETERS = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # of AdamW, apart from the learning rate


class ModelState:
    """The weights of a model, sharded or not; restores full weights with a readable error if they do not fit."""

    def __init__(self, model):
        self.model = model

    def state_dict(self):
        """Return the weights by their published names."""
        return self.model.state_dict()

    def load_state_dict(self, state):
        """Load full weights; names or shapes that differ raise a `UserError`."""
        load_weights(self.model, _shard_state_like(self.model.state_dict(), unwrap_state_dict(state)),
                     "the checkpoint")


class EMAStates:
    """Further moving averages than the first, by their decay: {"0.999": weights}."""

    def __init__(self, emas):
        self.states = {f"{ema.decay:g}": ModelState(ema.model) for ema in emas}

    def state_dict(self):
        """Return the weights of each average."""
        return {decay: state.state_dict() for decay, state in self.states.items()}

    def load_state_dict(self, state):
        """Load the average of each decay."""
        for decay, average in self.states.items():
            average.load_state_dict(state[decay])


class OptimizerState:
    """The moments of AdamW. Its hyperparameters come from the flags, not from the checkpoint."""

    def __init__(self, optimizer, model):
        self.optimizer, self.model = optimizer, model

    def state_dict(self):
        """Return the published state: moments by the number of the weight, and hyperparameters."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Load the moments; those that do not fit the weights raise a ValueError."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = {i: _shard_state_like(dict.fromkeys(values, weights[i]), values)
                   for i, values in state["state"].items()}
        # The hyperparameters of a group decide on which device its moments belong.
        groups = [current | dict(params=stored["params"])
                  for stored, current in zip(state["param_groups"], self.optimizer.param_groups, strict=True)]
        self.optimizer.load_state_dict(state | dict(state=moments, param_groups=groups))
        self._check_moments()

    def _check_moments(self):
        """Compare shapes and values with the weights. Before the first applied step there are no moments."""
        if not self.optimizer.state:
            return
        for name, weight in self.model.named_parameters():
            if not weight.requires_grad:
                continue
            moments = self.optimizer.state.get(weight, {})
            shapes = {key: tuple(moments[key].shape) for key in ("exp_avg", "exp_avg_sq", "step")}
            if shapes != dict(exp_avg=tuple(weight.shape), exp_avg_sq=tuple(weight.shape), step=()):
                raise ValueError(f"the optimizer's moments of {name} have the shapes {shapes}")
            if not all(torch.is_floating_point(value) for value in moments.values()):
                raise ValueError(f"the optimizer's moments of {name} are not floating-point numbers")
            if not moments["step"] >= 0:
                raise ValueError(f"the optimizer made {float(moments['step'])} steps with {name}")


def _shard_state_like(patterns, tensors):
    """Shard full tensors like those of the same names in `patterns`."""
    return {name: shard_like(patterns.get(name), value) for name, value in tensors.items()}


def match_averages(stored, decays):
    """Give the averages of a checkpoint the places, `ema` and `extra_emas`, that a run with these decays expects.

    A single average that continues with another decay stays as it is.

    Returns:
        list[str]: A sentence about each average that starts from the weights, and each that is dropped.
    """
    stored_decays = _stored_args(stored).get("ema_decay", decays[0])
    stored_decays = stored_decays if isinstance(stored_decays, list) else [stored_decays]
    wanted = [f"{decay:g}" for decay in decays]
    first = wanted[0] if len(stored_decays) == len(wanted) == 1 else f"{stored_decays[0]:g}"
    averages = {first: stored["ema"]} | (stored.get("extra_emas") or {})
    changes, dropped = [], [decay for decay in averages if decay not in wanted]
    for decay in wanted:
        if decay not in averages:
            changes.append(f"the average of decay {decay} starts from the weights")
        elif not is_finite(averages[decay]):
            changes.append(f"the average of decay {decay} is not finite and cannot recover: it starts from the weights")
            del averages[decay]
    places = {decay: averages.get(decay, stored["model"]) for decay in wanted}
    stored["ema"] = places.pop(wanted[0])
    stored["extra_emas"] = places
    return changes + [f"the average of decay {decay} is dropped" for decay in dropped]


def _stored_args(stored):
    return stored["args"] if isinstance(stored["args"], Mapping) else vars(stored["args"])


def find_config_changes(stored, args, config):
    """Compare a checkpoint with the flags of the run that is to resume it, and with its `config` of model and data.

    Returns:
        list[str]: A sentence about each flag and each property of the data that is not what it was.

    Raises:
        UserError: If the file holds no training state, or that of another model.
    """
    missing = [name for name in ("model", "ema", "opt", "args") if not stored.get(name)]
    if missing:
        raise UserError(f"this file has no {', '.join(missing)}. It may do to sample from, but not to resume training")
    if not stored["opt"]["state"] and stored.get("step", 1) > stored.get("guard", {}).get("total", 0):
        raise ValueError("the optimizer's moments are missing")
    stored_config = stored.get("config", {})
    # Before checkpoints named their block type there was only this one.
    stored_model = dict(conditioning="adaln-zero") | stored_config["model"] if stored_config.get("model") else {}
    model_changes = {name: value for name, value in stored_model.items() if value != config["model"].get(name)}
    if model_changes:
        then = ", ".join(f"{name}={value}" for name, value in model_changes.items())
        now = ", ".join(f"{name}={config['model'].get(name)}" for name in model_changes)
        raise UserError(f"this checkpoint is of another model ({then}; the flags give {now}). Give the flags that it "
                        "was trained with")
    stored_args = dict(ema_warmup=False, objective="ddpm") | _stored_args(stored)
    changes = [f"{flag_name(name)} is {_as_typed(value)}, it was {_as_typed(stored_args[name])}"
               for name, value in args.items()
               if name in stored_args and name not in CHANGEABLE_FLAGS and stored_args[name] != value]
    changes += [f"the data have {name.replace('_', ' ')} {_shorten(config[name])}, they had "
                f"{_shorten(stored_config[name])}" for name in ("num_images", "class_names", "latents")
                if name in stored_config and stored_config[name] != config[name]]
    # Files of others do not hold the learning rate as a flag.
    optimizer = dict(HYPERPARAMETERS, lr=args["lr"]) if "lr" not in stored_args else HYPERPARAMETERS
    return changes + [f"{'--' * (name == 'lr')}{name} of the optimizer is {value}, it was {group[name]}"
                      for group in stored["opt"]["param_groups"] for name, value in optimizer.items()
                      if name in group and not np.allclose(group[name], value, rtol=1e-6, atol=0)]


def _as_typed(value):
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _shorten(value):
    if isinstance(value, dict):
        return ", ".join(f"{name}={str(part)[:12]}" for name, part in value.items())
    return f"{value[:3]}..." if isinstance(value, list) and len(value) > 3 else value
