"""The forward process q, its posterior, and the reverse step p that a network parameterises."""
import numpy as np
import torch

VARIANCES = ("learned_range", "fixed_large", "fixed_small")
LOSSES = ("mse", "rescaled_mse", "kl")


class Process:
    """Tables and one-step distributions of a diffusion process.

    betas               (T,) float64 in (0, 1): variance that step t adds
    timestep_map        (T,) integers: the step of the trained process that each step is (what the network is told)
    original_num_steps  length of the trained process
    predict_xstart      the network predicts x_0; else the noise eps
    variance            "learned_range" (Improved DDPM, eq. 15), "fixed_large" (beta_t) or "fixed_small" (btilde_t)
    loss                "mse", "rescaled_mse" or "kl"; see `training_losses`

    Public tables are float64 NumPy arrays of length T. In all methods x, x_0, x_t, noise are (N, C, ...) and
    t is (N,) integers in [0, T); t = 0 is one noising step, not none.
    """

    def __init__(self, betas, timestep_map, original_num_steps, predict_xstart, variance, loss):
        if variance not in VARIANCES or loss not in LOSSES:
            raise ValueError(f"variance={variance!r} must be one of {VARIANCES}, loss={loss!r} one of {LOSSES}")
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a list of numbers in (0, 1], got shape {betas.shape}, "
                             f"range [{betas.min():g}, {betas.max():g}]")
        self.num_timesteps = len(betas)
        self.original_num_steps = original_num_steps
        self.timestep_map = list(timestep_map)
        self.predict_xstart, self.variance, self.loss = predict_xstart, variance, loss

        self.betas = betas
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I), DDPM eq. 4, and its inversion
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7; its variance btilde_t is 0 at t = 0, so the log takes that of t = 1
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        second = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = ((1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - betas)
                                     / (1.0 - self.alphas_cumprod))

        # Reverse step: a learned log variance lies between these two tables' logs, a fixed one is one of them.
        self.log_betas, log_small = np.log(betas), self.posterior_log_variance_clipped
        # beta_t is too wide for the last step to x_0: there btilde of t = 1 is closer (Improved DDPM, section 3.1)
        self.fixed_variance = self.posterior_variance if variance == "fixed_small" else np.append(second, betas[1:])
        self.fixed_log_variance = log_small if variance == "fixed_small" else np.log(self.fixed_variance)
        # 0 at the last step to x_0, which adds no noise
        self.adds_noise = (np.arange(self.num_timesteps) > 0).astype(np.float64)
        self._on_device = {}

    def _at(self, t, ndim, *names):
        """The named tables at steps t, each (N, 1, ...) of `ndim` dimensions, float32, on t's device.

        A table goes to a device once; after that a look-up of several is one gather there.
        """
        table = self._on_device.get((t.device, names))
        if table is None:
            stacked = np.stack([getattr(self, name) for name in names])
            table = torch.tensor(stacked, dtype=torch.float32, device=t.device)
            self._on_device[t.device, names] = table
        return table.index_select(1, t).view(len(names), len(t), *(1,) * (ndim - 1)).unbind()

    def _original_t(self, t):
        """Steps of the trained process for steps t of this one: what a network or classifier is told."""
        steps = self._on_device.get((t.device, "timestep_map"))
        if steps is None:
            steps = self._on_device[t.device, "timestep_map"] = torch.tensor(self.timestep_map, device=t.device)
        return steps[t]

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log variance of q(x_t | x_0), each of x_start's shape (DDPM, eq. 4)."""
        scale, variance, log_variance = self._at(
            t, x_start.ndim, "sqrt_alphas_cumprod", "one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod")
        return scale * x_start, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start, t, noise=None):
        """Diffuse clean latents: x_t ~ q(x_t | x_0) (DDPM, eq. 4).

        x_start  (N, C, ...) scaled latents, not confined to [-1, 1]
        noise    (N, C, ...) standard normal; drawn from the global generator if None
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        _check_same("noise", noise, "x_start", x_start)
        signal, sigma = self._at(t, x_start.ndim, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return weighted_sum(signal, x_start, sigma, noise)

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), each of x_t's shape (DDPM, eq. 6, 7)."""
        _check_same("x_start", x_start, "x_t", x_t)
        variance, log_variance = self._at(t, x_t.ndim, "posterior_variance", "posterior_log_variance_clipped")
        return self._posterior_mean(x_start, x_t, t), variance.expand_as(x_t), log_variance.expand_as(x_t)

    def _posterior_mean(self, x_start, x_t, t):
        coef1, coef2 = self._at(t, x_t.ndim, "posterior_mean_coef1", "posterior_mean_coef2")
        return weighted_sum(coef1, x_start, coef2, x_t)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """The reverse step p(x_{t-1} | x_t) that the network gives.

        model          callable (x, t, **model_kwargs) -> (N, C, ...), or (N, 2C, ...) with a learned variance
        clip_denoised  confine the predicted x_0 to [-1, 1] (pixels; latents have no such range)
        denoised_fn    applied to the predicted x_0 before clipping
        return         dictionary: mean, variance, log_variance, pred_xstart, each of x's shape
        """
        mean, log_variance, pred_xstart = self._reverse_step(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if self.variance == "learned_range":
            variance = torch.exp(log_variance)
        else:
            (variance,) = self._at(t, x.ndim, "fixed_variance")
        return dict(mean=mean, variance=variance.expand_as(x), log_variance=log_variance.expand_as(x),
                    pred_xstart=pred_xstart)

    def _reverse_step(self, model, x, t, clip_denoised, denoised_fn, model_kwargs):
        """Mean, log variance (broadcastable) and predicted x_0; what `p_mean_variance` needs and samplers use."""
        prediction, values = self._split_output(model(x, self._original_t(t), **(model_kwargs or {})), x)
        pred_xstart = self._pred_xstart(prediction, x, t, clip_denoised, denoised_fn)
        return self._posterior_mean(pred_xstart, x, t), self._log_variance(values, x, t), pred_xstart

    def _split_output(self, output, x):
        """The network's output -> (prediction of x's shape, variance values of x's shape or None)."""
        learned = self.variance == "learned_range"
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(f"the model returned shape {tuple(output.shape)} for an input of {tuple(x.shape)}; "
                             f"with {'a learned' if learned else 'a fixed'} variance it must return {expected}")
        return output.chunk(2, dim=1) if learned else (output, None)

    def _pred_xstart(self, prediction, x_t, t, clip_denoised=False, denoised_fn=None):
        """The x_0 that a network's prediction (of x_0 or of the noise) stands for."""
        x_0 = prediction if self.predict_xstart else self._predict_xstart_from_eps(x_t, t, prediction)
        if denoised_fn is not None:
            x_0 = denoised_fn(x_0)
        return x_0.clamp(-1, 1) if clip_denoised else x_0

    def _log_variance(self, values, x, t):
        """Improved DDPM, eq. 15: log var = v log beta_t + (1 - v) log btilde_t, v = (values + 1) / 2."""
        if values is None:
            return self._at(t, x.ndim, "fixed_log_variance")[0]
        log_beta, log_small = self._at(t, x.ndim, "log_betas", "posterior_log_variance_clipped")
        # Before, not after: in bfloat16 v and 1 - v do not add up to 1, and late in the process that is all there is.
        values = values.to(torch.promote_types(values.dtype, log_beta.dtype))
        v = (values + 1).mul_(0.5)
        return weighted_sum(log_beta, v, log_small, 1 - v)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        """Solve x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for x_0."""
        a, b = self._at(t, x_t.ndim, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (a * x_t).sub_(b * eps)

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        """Solve x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for eps."""
        a, b = self._at(t, x_t.ndim, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (a * x_t - pred_xstart) / b

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Classifier guidance of a DDPM step: the mean, shifted by variance * grad log p(y | x_t).

        cond_fn     callable (x, t, **model_kwargs) -> the gradient, of x's shape; t in trained steps
        p_mean_var  what `p_mean_variance` returned
        return      the new mean (Dhariwal & Nichol, algorithm 1)
        """
        gradient = cond_fn(x, self._original_t(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Classifier guidance of a DDIM step: the noise, shifted by -sqrt(1 - alpha_bar) * grad log p(y | x_t).

        Arguments as for `condition_mean`; returns p_mean_var with pred_xstart and mean replaced (algorithm 2).
        """
        gradient = cond_fn(x, self._original_t(t), **(model_kwargs or {}))
        (sigma,) = self._at(t, x.ndim, "sqrt_one_minus_alphas_cumprod")
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"]) - sigma * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        return dict(p_mean_var, pred_xstart=pred_xstart, mean=self._posterior_mean(pred_xstart, x, t))


def weighted_sum(a, x, b, y):
    """a x + b y with one temporary: these tensors are large, and getting memory costs more than the arithmetic."""
    return (a * x).add_(b * y)


def _check_same(name, tensor, other_name, other):
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {other_name} has {tuple(other.shape)}: "
                         "they must be the same")
