"""The transport between noise and data: training losses, and velocity and score of a model."""
import math

import torch

from .paths import expand_as

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = (None, "velocity", "likelihood")
SMALLEST_EPS = 1e-3  # distance from an end where a coefficient is infinite, if `sample_eps` is 0


class Transport:
    """A path with a kind of prediction; `create_transport` builds one and describes the arguments.

    In all methods x_1 (data), noise and x have shape (N, C, ...), t has shape (N,), and `model` is a callable
    (x, t, **model_kwargs) -> prediction (N, C, ...), or (N, 2C, ...) of which the second half is dropped.
    """

    def __init__(self, path, prediction, loss_weight, train_eps, sample_eps, time_shift=1.0, time_scale=1.0):
        for name, value, choices in (("prediction", prediction, PREDICTIONS),
                                     ("loss_weight", loss_weight, LOSS_WEIGHTS)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(map(str, choices))}")
        for name, value in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if not 0 <= value < 0.5:
                raise ValueError(f"{name} must lie in [0, 0.5), not {value}")
        for name, value in (("time_shift", time_shift), ("time_scale", time_scale)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        self.path, self.prediction, self.loss_weight = path, prediction, loss_weight
        self.train_eps, self.sample_eps = train_eps, sample_eps
        self.time_shift, self.time_scale = time_shift, time_scale

    # ---------------------------------------------------------------- training

    def training_losses(self, model, x1, model_kwargs=None, t=None, noise=None):
        """Compute the mean squared error of the prediction for each sample.

        Args:
            model (callable): See the class.
            x1 (Tensor): Data, shape (N, C, ...).
            model_kwargs (dict): Further arguments of the model.
            t (Tensor): Times, shape (N,). Default: uniform, drawn from the global generator after the noise.
            noise (Tensor): Standard normal noise, shape (N, C, ...). Default: drawn from the global generator.

        Returns:
            dict[str, Tensor]: "loss", shape (N,), and "pred", the prediction, of the shape of x1.
        """
        noise = torch.randn_like(x1) if noise is None else noise
        if noise.shape != x1.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, x1 has {tuple(x1.shape)}: they must be equal")
        t = self.training_times(torch.rand(len(x1))).to(x1) if t is None else t
        x_t, velocity = self.path.interpolate(t, noise, x1)
        prediction = self.predict(model, x_t, t, **(model_kwargs or {}))
        if self.prediction == "velocity":
            error = prediction - velocity
        elif self.prediction == "noise":
            error = prediction - noise
        else:  # sigma s is minus the noise: this scale keeps the error finite where the score is not
            error = prediction * self.path.coefficients(expand_as(t, x1))[1] + noise
        loss = error.square().flatten(1).mean(dim=1)
        return dict(loss=loss if self.prediction == "velocity" else self._weight(t) * loss, pred=prediction)

    def training_times(self, u):
        """Map numbers in [0, 1] to training times: shifted, and away from singular ends."""
        return self.spread_times(u, *self._interval(self.train_eps))

    def spread_times(self, u, t0, t1):
        """Map numbers u in [0, 1] to times in [t0, t1] that `time_shift` moves; both ends stay."""
        if self.time_shift == 1:
            return u * (t1 - t0) + t0
        first, last = (_shift(end, 1 / self.time_shift) for end in (t0, t1))
        return _shift(u * (last - first) + first, self.time_shift)

    def _weight(self, t):
        """Return the weight of the loss of noise or score at times t, shape (N,) (SiT, section 2)."""
        if self.loss_weight is None:
            return 1.0
        (_, g), sigma = self.path.drift_coefficients(t), self.path.coefficients(t)[1]
        return (g / sigma) ** 2 if self.loss_weight == "velocity" else g / sigma**2

    # ---------------------------------------------------------------- prediction, velocity and score of a model

    def predict(self, model, x, t, **model_kwargs):
        """Return the model's prediction at (x, t), without the second half of its channels if it has twice as many."""
        output = model(x, t if self.time_scale == 1 else t * self.time_scale, **model_kwargs)
        n, channels, *size = x.shape
        if output.shape == (n, 2 * channels, *size):
            return output[:, :channels]
        if output.shape != x.shape:
            raise ValueError(f"the model returned shape {tuple(output.shape)} for an input of {tuple(x.shape)}; it "
                             "must return as many channels, or twice as many")
        return output

    def velocity(self, model, x, t, **model_kwargs):
        """Return the velocity of the probability flow at (x, t)."""
        prediction = self.predict(model, x, t, **model_kwargs)
        if self.prediction == "velocity":
            return prediction
        return self.path.velocity_from_score(x, t, self._score(prediction, x, t))

    def velocity_and_score(self, model, x, t, **model_kwargs):
        """Return velocity and score at (x, t), from one call of the model."""
        prediction = self.predict(model, x, t, **model_kwargs)
        score = self._score(prediction, x, t)
        if self.prediction == "velocity":
            return prediction, score
        return self.path.velocity_from_score(x, t, score), score

    def _score(self, prediction, x, t):
        if self.prediction == "score":
            return prediction
        if self.prediction == "velocity":
            return self.path.score_from_velocity(x, t, prediction)
        return -prediction / self.path.coefficients(expand_as(t, x))[1]

    # ---------------------------------------------------------------- sampling

    def ode_interval(self, reverse=False):
        """Return the first and last time of the probability-flow ODE; reversed, from data to noise."""
        t0, t1 = self._interval(self.sample_eps)
        if not reverse:
            return t0, t1
        # Published: ends mirrored at 1/2, which differs on VP alone. A noise has no velocity at t = 1 though.
        return min(1 - t0, t1) if self.prediction == "noise" else 1 - t0, 1 - t1

    def sde_interval(self, diffusion_form, last_step_size):
        """Return the first time of the SDE, and the time of its last step, which makes up for `last_step_size`."""
        eps = self.sample_eps
        is_infinite = self.path.is_singular_at_noise and diffusion_form == "SBDM"
        t0 = (eps or SMALLEST_EPS) if is_infinite else self._interval(eps)[0]
        return t0, 1 - (last_step_size or eps or SMALLEST_EPS)

    def _interval(self, eps):
        """Keep the distance eps from ends of [0, 1] where the path or the conversion to a velocity is singular."""
        is_converted = self.prediction != "velocity"
        at_noise = self.path.is_singular_at_noise and is_converted
        at_data = not self.path.is_singular_at_noise or is_converted
        return eps if at_noise else 0.0, 1 - eps if at_data else 1.0

    def prior_logp(self, z):
        """Return the log density of noise z under the standard normal distribution, in nats, shape (N,)."""
        z = z.flatten(1)
        return -0.5 * (z.shape[1] * math.log(2 * math.pi) + z.square().sum(dim=1))


def _shift(t, factor):
    """Multiply the ratio of noise to data, (1 - t) / t, by a factor."""
    level = 1 - t
    return 1 - factor * level / (1 + (factor - 1) * level)
