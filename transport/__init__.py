"""Interpolants and flow matching: the paths, the losses and the samplers that SiT made known.

    transport = create_transport("Linear", "velocity")
    loss = transport.training_losses(model, latents, dict(y=labels))["loss"].mean()
    latents = Sampler(transport).sample_ode(sampling_method="heun", num_steps=25)(noise, model.eval(), y=labels)[-1]

Time runs from 0 (noise) to 1 (data). A model that predicts a variance too may be used; that half is dropped.

Sources: SiT (Ma et al., 2024, arXiv 2401.08740), stochastic interpolants (Albergo et al., 2023, arXiv 2303.08797),
flow matching (Lipman et al., 2022, arXiv 2210.02747).
"""
from .paths import DIFFUSION_FORMS, PATHS
from .sampler import LAST_STEPS, SDE_METHODS, Sampler
from .time_sampler import TIME_DISTRIBUTIONS, TimeSampler
from .transport import LOSS_WEIGHTS, PREDICTIONS, Transport

__all__ = ["DIFFUSION_FORMS", "LAST_STEPS", "LOSS_WEIGHTS", "PATHS", "PREDICTIONS", "SDE_METHODS", "TIME_DISTRIBUTIONS",
           "Sampler", "TimeSampler", "Transport", "create_transport"]


def create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None,
                     time_shift=1.0, time_scale=1.0):
    """Build the transport from noise to data that a model is trained for or sampled from.

    Args:
        path_type (str): "Linear", "GVP" or "VP"; see `transport.paths`.
        prediction (str): What the model predicts: "velocity", "noise" or "score".
        loss_weight (str | None): Weight of the loss of noise and score over time: "velocity", "likelihood" or None.
        train_eps (float | None): Distance that training keeps from the ends of [0, 1] if the prediction or the path is
            singular there. Default: 1e-5 for VP, 0 for velocities on the other paths, otherwise 1e-3.
        sample_eps (float | None): The same for sampling. Default: 0 for velocities on Linear and GVP, otherwise 1e-3.
        time_shift (float): s that moves times of training and sampling towards the noise: its level 1 - t becomes
            s (1 - t) / (1 + (s - 1) (1 - t)) (Esser et al., 2024, arXiv 2403.03206). 1: none.
        time_scale (float): Factor of the times that the model is given; 1000 for the range of DDPM's timesteps.

    Raises:
        ValueError: If a name is unknown or a number out of range.
    """
    if path_type not in PATHS:
        raise ValueError(f"unknown path_type {path_type!r}: use one of {', '.join(PATHS)}")
    is_regular = prediction == "velocity" and path_type != "VP"
    if train_eps is None:
        train_eps = 1e-5 if path_type == "VP" else 0.0 if is_regular else 1e-3
    if sample_eps is None:
        sample_eps = 0.0 if is_regular else 1e-3
    return Transport(PATHS[path_type](), prediction, loss_weight, train_eps, sample_eps, time_shift, time_scale)
