"""Weights in files of any origin: which entries are weights, and the names without what wrappers add to them."""
import math
import re

import torch

from common.errors import ArgumentError, UserError

# The first layer of a DiT: where it is, the weights are.
ANCHOR = "x_embedder.proj.weight"
# A fixed table that the model computes itself, so that files may lack it.
FIXED_WEIGHTS = {"pos_embed"}
# What torch.compile, FSDP and activation checkpointing add to names, at the front or inside.
_INSERTED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Wrappers that hold a model under a name of theirs; only at the front, since a part of a model may have this name too.
_WRAPPER = re.compile(r"^(?:module\.)+")
# Entries of a training state that hold tensors, but no weights to use.
_NOT_WEIGHTS = {"opt", "optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "scheduler",
                "lr_scheduler", "lr_schedulers", "scaler", "extra_emas", "guard", "schedule_sampler", "callbacks"}
_AVERAGES = {"avg", "average", "averaged", "swa", "shadow", "polyak"}
MAX_DEPTH = 6


def unwrap_state_dict(state_dict):
    """Take off what wrappers add: `module.` (DDP), `_orig_mod.` (torch.compile), `ema_model.`, `n_averaged`, ...

    Args:
        state_dict (dict[str, Tensor]): Weights of one model, by names with or without the prefixes of wrappers.

    Returns:
        dict[str, Tensor]: The weights by their names in the model. If this is no DiT, only known prefixes are gone.
    """
    sets = _find_by_anchor(state_dict)
    if sets:
        averages = [weights for prefix, weights in sets.items() if _is_average(prefix)]
        return (averages or list(sets.values()))[0]
    unwrapped = {_WRAPPER.sub("", _INSERTED.sub("", name)): value for name, value in state_dict.items()
                 if isinstance(name, str)}
    return {name: value for name, value in unwrapped.items() if name != "n_averaged"}


def select_weights(checkpoint, path, weights=None, log=None):
    """Select the weights to sample with: an average ("ema"), else those of a model ("model"), else "bare" ones.

    They are found at any depth and under any name, such as `state_dict` (Lightning), `module` (DeepSpeed) or
    `ema.ema_model`.

    Args:
        checkpoint (dict): What `load_checkpoint` returned.
        path (str): Its path, for errors.
        weights (str): "ema" or "model": which to take if both are there.
        log (callable): Called with a line about weights that are there and cannot be used.

    Returns:
        tuple[dict[str, Tensor], str]: State dictionary without what wrappers add, and "ema", "model" or "bare".
    """
    sets = _list_sets(checkpoint)
    if not sets:
        raise UserError(f"{path} holds no weights of a DiT: {_describe(checkpoint)}")
    kinds = [kind for kind, *_ in sets]
    kind = weights or next(kind for kind in ("ema", "model", "bare") if kind in kinds)
    if kind not in kinds:
        stored = " and ".join(dict.fromkeys(f"{kind!r}" for kind in kinds)).replace("'bare'", "bare weights")
        raise ArgumentError(f"{path} has no such weights, only {stored}. Leave this out.", weights=weights)
    average = checkpoint.get("ema")
    if log and weights is None and kind != "ema" and isinstance(average, (dict, list)) and average:
        log(f"WARNING: {path}: 'ema' is in a layout that is not read ({_describe(average)}); the weights of {kind!r} "
            "are taken")
    (prefix, state_dict), *others = [(prefix, state_dict) for found, prefix, state_dict in sets if found == kind]
    if log and others:
        names = shorten(repr(other.rstrip(".")) for other, _ in others)
        log(f"WARNING: {path} holds several models: the weights of {prefix.rstrip('.')!r} are taken, not of {names}")
    return state_dict, kind


def find_weights(checkpoint):
    """List the sets of weights in a file as (kind, state dictionary), kind being "ema", "model" or "bare"."""
    return [(kind, weights) for kind, _, weights in _list_sets(checkpoint)]


def _list_sets(checkpoint):
    """List the sets of weights in a file as (kind, prefix of their names, state dictionary)."""
    if not isinstance(checkpoint, dict):
        return []
    found = sorted(_find_by_anchor(checkpoint).items(), key=lambda pair: _rank(pair[0]))
    is_bare = len(found) == 1 and any(map(torch.is_tensor, checkpoint.values()))
    sets = [("ema" if _is_average(prefix) else "bare" if is_bare else "model", prefix, weights)
            for prefix, weights in found]
    if not sets:
        return [(kind, "", weights) for kind, weights in _find_by_key(checkpoint)]
    if all(kind != "ema" for kind, *_ in sets):
        model = sets[0][2]
        average = _read_shadow_params(checkpoint, model) or _read_dotless(checkpoint, model)
        sets += [("ema", "", average)] if average else []
    return sets


def _rank(prefix):
    """Order sets of one kind: `model` before others, then what is least deep."""
    return not prefix.startswith("model."), prefix.count("."), prefix


def _find_by_anchor(checkpoint):
    """Return {prefix: weights} of each DiT in nested dictionaries; counters, which have no dimension, are left out."""
    tensors = {_INSERTED.sub("", name): value for name, value in _flatten(checkpoint) if value.ndim}
    prefixes = [name[:-len(ANCHOR)] for name in tensors if name == ANCHOR or name.endswith("." + ANCHOR)]
    sets = {}
    for prefix in sorted(prefixes, key=len, reverse=True):  # the innermost first: it is no part of an outer one
        names = [name for name in tensors if name.startswith(prefix)]
        sets[prefix] = {name[len(prefix):]: tensors.pop(name) for name in names}
    return sets


def list_tensor_names(checkpoint):
    """List the names of all tensors in nested dictionaries, joined by dots."""
    return [name for name, _ in _flatten(checkpoint)] if isinstance(checkpoint, dict) else []


def _flatten(value, prefix="", depth=0):
    """Yield (name, tensor) of nested dictionaries, names joined by dots."""
    for name, part in value.items():
        if not isinstance(name, str):
            continue
        if torch.is_tensor(part):
            yield prefix + name, part if part.layout == torch.strided else part.to_dense()
        elif isinstance(part, dict) and depth < MAX_DEPTH and name not in _NOT_WEIGHTS:
            yield from _flatten(part, f"{prefix}{name}.", depth + 1)


def _is_average(prefix):
    parts = set(re.split(r"[._]", prefix.lower()))
    is_ema = any(part.startswith("ema") or part.endswith("ema") for part in parts)  # such as "modelEMA"
    return (is_ema or bool(parts & _AVERAGES)) and "online" not in parts


def _find_by_key(checkpoint):
    """List the sets of weights of another network than a DiT, by the usual keys, so that errors can name theirs."""
    sets = [(kind, unwrap_state_dict(checkpoint[kind])) for kind in ("ema", "model")
            if isinstance(checkpoint.get(kind), dict) and any(map(torch.is_tensor, checkpoint[kind].values()))]
    if not sets and checkpoint and all(map(torch.is_tensor, checkpoint.values())):
        sets = [("bare", unwrap_state_dict(checkpoint))]
    return sets or [("model", unwrap_state_dict(part)) for name, part in checkpoint.items()
                    if isinstance(part, dict) and name not in _NOT_WEIGHTS and part
                    and all(map(torch.is_tensor, part.values()))][:1]


def _read_shadow_params(checkpoint, model):
    """Return an average that is a list without names (`shadow_params`), by the names and shapes of the model's weights.

    The list has the order of the model's weights, all of them or without the fixed ones. None: there is no such list.
    """
    parts = [part for part in (checkpoint, *checkpoint.values()) if isinstance(part, dict)]
    values = next((part["shadow_params"] for part in parts if isinstance(part.get("shadow_params"), list)), None)
    for names in (list(model), [name for name in model if name not in FIXED_WEIGHTS]):
        if values and len(values) == len(names) and all(
                torch.is_tensor(value) and value.shape == model[name].shape for name, value in zip(names, values)):
            return {name: model[name] for name in FIXED_WEIGHTS & model.keys()} | dict(zip(names, values))
    return None


def _read_dotless(checkpoint, model):
    """Return an average whose names have no dots, as latent diffusion's LitEma writes them; None if there is none.

    It holds the trained weights of a module around the model: "model_ema.diffusion_modelblocks0attnqkvweight".
    """
    tensors = dict(_flatten(checkpoint))
    anchor = ANCHOR.replace(".", "")
    prefix = next((name[:-len(anchor)] for name in tensors if name.endswith(anchor)), None)
    if prefix is None:
        return None
    average = {name: tensors.get(prefix + name.replace(".", "")) for name in model}
    average |= {name: model[name] for name in FIXED_WEIGHTS & model.keys() if average[name] is None}
    fits = all(value is not None and value.shape == model[name].shape for name, value in average.items())
    return average if fits else None


def _describe(value):
    """Say what is in a file, for an error: the keys of a dictionary, or a type."""
    if torch.is_tensor(value):
        return "it is a single tensor"
    if not isinstance(value, dict):
        return f"it is a {type(value).__name__}"
    return f"its keys are {shorten(map(repr, value), 8)}" if value else "it is empty"


def shorten(items, count=3):
    """Join the first items by commas, and say how many more there are."""
    items = list(items)
    return ", ".join(items[:count]) + (f" and {len(items) - count} more" if len(items) > count else "")


def describe_young_average(decay, step):
    """Describe an average that still holds much of the weights that training began with; None if it does not.

    Without a warm-up, decay^step of them is left after `step` steps.
    """
    share = decay**step
    return f"the EMA still holds {share:.0%} of its start (decay {decay:g}, {step:,} steps)" if share >= 0.1 else None


def check_finite(state_dict, path, remedy="Use another checkpoint."):
    """Raise a `UserError` if a weight is NaN or infinite: such a model makes black images and cannot recover."""
    if spoilt := find_non_finite(state_dict):
        raise UserError(f"{path}: the model makes images that are not finite, since its weights are NaN or infinite "
                        f"({shorten(spoilt)}). {remedy}")


def find_non_finite(state_dict):
    """List the names of the weights that have a NaN or infinite value."""
    return [name for name, value in state_dict.items() if not is_finite(value)]


def is_finite(value):
    """Return whether tensors in nested dictionaries and lists are finite, and no number in them is NaN."""
    if torch.is_tensor(value):
        has_one_byte = value.is_floating_point() and value.itemsize == 1  # 8-bit floats have no `isfinite`
        return bool(torch.isfinite(value.float() if has_one_byte else value).all())
    if isinstance(value, float):
        return not math.isnan(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(is_finite, parts))


def load_weights(model, state_dict, path):
    """Load weights strictly; if they do not fit, raise a `UserError` with the differences and load none.

    Fixed tables that the file lacks stay what the model computed.
    """
    current = model.state_dict()
    fixed = {name: value for name, value in current.items() if name in FIXED_WEIGHTS - state_dict.keys()}
    shapes = {name: tuple(value.shape) for name, value in current.items() if name not in fixed}
    stored = {name: tuple(value.shape) if torch.is_tensor(value) else None for name, value in state_dict.items()}
    differences = {
        "missing": sorted(shapes.keys() - stored.keys()),
        "unknown": sorted(stored.keys() - shapes.keys()),
        "of another shape": [f"{name} {stored[name]} instead of {shape}" for name, shape in shapes.items()
                             if stored.get(name, shape) != shape],
        "no floating-point numbers": [f"{name} ({state_dict[name].dtype})" for name in shapes if stored.get(name)
                                      and current[name].is_floating_point() > state_dict[name].is_floating_point()]}
    problems = [f"{problem}: {shorten(names)}" for problem, names in differences.items() if names]
    if problems:
        is_quantized = not any(differences[problem] for problem in ("missing", "unknown", "of another shape"))
        remedy = ("Convert them to float32." if is_quantized else
                  "Check its name, its sizes, image size and number of classes.")
        raise UserError(f"the weights in {path} do not fit this model ({'; '.join(problems)}). {remedy}")
    model.load_state_dict(fixed | state_dict, strict=True)
