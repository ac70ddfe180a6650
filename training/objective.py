"""What a model is trained for: the process with its loss, and the sampler of its times."""
from common.errors import ArgumentError
from diffusion import create_diffusion
from diffusion.timestep_sampler import create_named_schedule_sampler
from transport import TimeSampler, create_transport

OBJECTIVES = ("ddpm", "flow")
FLOW_DEFAULTS = dict(path_type="Linear", prediction="velocity", loss_weight=None, time_sampling="uniform",
                     time_shift=1.0, time_scale=1.0)


def build_objective(flags):
    """Build the objective of the flags of train.py, and the sampler of its times.

    Both kinds have `training_losses(model, x, t=, model_kwargs=, noise=)`, which returns per-sample terms with "loss",
    and a sampler with `sample(batch_size, device, generator)`: nothing else of training knows the kind.

    Returns:
        tuple: `GaussianDiffusion` and `ScheduleSampler`, or `Transport` and `TimeSampler`.
    """
    if flags.objective == "ddpm":
        diffusion = create_diffusion(timestep_respacing="", learn_sigma=flags.learn_sigma)
        return diffusion, create_named_schedule_sampler(flags.schedule_sampler, diffusion)
    transport = create_transport(flags.path_type, flags.prediction, flags.loss_weight, time_shift=flags.time_shift,
                                 time_scale=flags.time_scale)
    return transport, TimeSampler(transport, flags.time_sampling)


def check_objective_flags(flags, explicit_args):
    """Raise an `ArgumentError` for flags that belong to another objective than the chosen one."""
    if flags.objective == "ddpm":
        for name in FLOW_DEFAULTS:
            if name in explicit_args:
                raise ArgumentError("belongs to flow matching. Add --objective flow, or leave this out.",
                                    **{name: getattr(flags, name)})
        return
    if flags.schedule_sampler != "uniform":
        raise ArgumentError("importance sampling needs the discrete timesteps of --objective ddpm. Use uniform; the "
                            "times of flow matching are chosen by --time-sampling.",
                            schedule_sampler=flags.schedule_sampler)
    for name in ("sample_every", "eval_every"):
        if getattr(flags, name):
            raise ArgumentError("models of flow matching cannot be sampled by the commands yet. Leave this out; the "
                                "library samples them, see docs/flow_matching.md.", **{name: getattr(flags, name)})
    if flags.loss_weight and flags.prediction == "velocity":
        raise ArgumentError("weights turn the loss of another prediction into one of velocities. Leave this out, or "
                            "choose --prediction noise or score.", loss_weight=flags.loss_weight)
