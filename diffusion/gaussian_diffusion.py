"""The diffusion process: forward process q, training loss, reverse process p, DDPM and DDIM sampling, the bound."""
import math

import numpy as np
import torch
from tqdm.auto import tqdm

from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl

VARIANCES = ("learned_range", "fixed_large", "fixed_small")
LOSSES = ("mse", "rescaled_mse", "kl")


class GaussianDiffusion:
    """A diffusion process with its training loss and samplers; `create_diffusion` builds one.

    Its tables are float64 arrays of shape (T,). In all methods x, x_start, x_t and noise have shape (N, C, ...), and t
    has shape (N,) with integers in [0, T); t = 0 is one noising step. Arguments that methods share:

        model            callable (x, t, **model_kwargs) -> prediction (N, C, ...), or with a learned variance
                         (N, 2C, ...); its t are steps of the trained process
        clip_denoised    clamp the predicted x_0 to [-1, 1] (pixels; latents have no such range)
        denoised_fn      function applied to the predicted x_0 before clipping
        cond_fn          classifier guidance: callable (x, t, **model_kwargs) -> gradient of log p(y | x_t), shape of x
        noise_fn         callable (x) -> standard normal noise of the shape of x, called once a step, even if that step
                         adds no noise: a seed gives one picture for any eta

    Args:
        betas (ndarray): Variance that each step adds, in (0, 1], shape (T,).
        timestep_map (list[int]): Step of the trained process that each step stands for, length T.
        original_num_steps (int): Length of the trained process.
        predict_xstart (bool): The model predicts x_0, otherwise the noise.
        variance (str): "learned_range" (Improved DDPM, eq. 15), "fixed_large" (beta_t) or "fixed_small" (btilde_t).
        loss (str): "mse", "rescaled_mse" or "kl"; see `training_losses`.
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

        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7. Its variance btilde_t is 0 at t = 0; the log takes that of t = 1.
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        second = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = ((1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - betas)
                                     / (1.0 - self.alphas_cumprod))

        # p(x_{t-1} | x_t): a learned log variance lies between the logs of beta_t and btilde_t, a fixed one is either.
        # At t = 0 beta_t is too large; btilde of t = 1 is closer (Improved DDPM, section 3.1).
        self.log_betas, log_small = np.log(betas), self.posterior_log_variance_clipped
        self.fixed_variance = self.posterior_variance if variance == "fixed_small" else np.append(second, betas[1:])
        self.fixed_log_variance = log_small if variance == "fixed_small" else np.log(self.fixed_variance)
        self.adds_noise = (np.arange(self.num_timesteps) > 0).astype(np.float64)  # the step to x_0 adds none
        self._device_tables = {}

    def _extract(self, t, ndim, *names):
        """Look up tables at steps t: float32 tensors (N, 1, ...) with `ndim` dimensions, on the device of t.

        A table is copied to a device once; after that a look-up of several tables is one gather.
        """
        table = self._device_table(names, t.device, torch.float32)
        return table.index_select(1, t).view(len(names), len(t), *(1,) * (ndim - 1)).unbind()

    def _original_t(self, t):
        """Look up the steps of the trained process that steps t stand for."""
        return self._device_table(("timestep_map",), t.device, torch.int64)[0, t]

    def _device_table(self, names, device, dtype):
        if (device, names) not in self._device_tables:
            stacked = np.stack([getattr(self, name) for name in names])
            self._device_tables[device, names] = torch.tensor(stacked, dtype=dtype, device=device)
        return self._device_tables[device, names]

    # ---------------------------------------------------------------- q: the forward process and its posterior

    def q_sample(self, x_start, t, noise=None):
        """Diffuse clean latents: sample x_t ~ q(x_t | x_0) (DDPM, eq. 4).

        Args:
            x_start (Tensor): Scaled latents, shape (N, C, ...), not confined to [-1, 1].
            t (Tensor): Timesteps, shape (N,).
            noise (Tensor): Standard normal noise, shape (N, C, ...). Default: drawn from the global generator.

        Returns:
            Tensor: Noisy latents, shape (N, C, ...).
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        _check_same_shape("noise", noise, "x_start", x_start)
        signal, sigma = self._extract(t, x_start.ndim, "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        return _weighted_sum(signal, x_start, sigma, noise)

    def q_mean_variance(self, x_start, t):
        """Return mean, variance and log variance of q(x_t | x_0), each of the shape of x_start (DDPM, eq. 4)."""
        scale, variance, log_variance = self._extract(
            t, x_start.ndim, "sqrt_alphas_cumprod", "one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod")
        return scale * x_start, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Return mean, variance, clipped log variance of q(x_{t-1} | x_t, x_0), of the shape of x_t (DDPM, eq. 6)."""
        _check_same_shape("x_start", x_start, "x_t", x_t)
        variance, log_variance = self._extract(t, x_t.ndim, "posterior_variance", "posterior_log_variance_clipped")
        return self._posterior_mean(x_start, x_t, t), variance.expand_as(x_t), log_variance.expand_as(x_t)

    def _posterior_mean(self, x_start, x_t, t):
        coef1, coef2 = self._extract(t, x_t.ndim, "posterior_mean_coef1", "posterior_mean_coef2")
        return _weighted_sum(coef1, x_start, coef2, x_t)

    # ---------------------------------------------------------------- the training loss

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Compute the loss of the paper, L_simple + L_vlb, for each sample (section 3.1; Improved DDPM, section 3.1).

        Returns:
            dict[str, Tensor]: "loss" (N,) and, by the kind of loss:
                "mse": "mse" and, if the variance is learned, "vb" in bits per dimension; the loss is their sum.
                "rescaled_mse": The same with vb times T / 1000.
                "kl": Nothing else; the loss is vb times T, an estimate of the full bound.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        prediction, values = self._split_output(model(x_t, self._original_t(t), **(model_kwargs or {})), x_t)
        if self.loss == "kl":
            return dict(loss=self._vb_of_prediction(prediction, values, x_start, x_t, t) * self.num_timesteps)
        target = x_start if self.predict_xstart else noise
        mse = mean_flat((target - prediction).square())
        if values is None:
            return dict(mse=mse, loss=mse)
        # L_vlb trains the variance alone: through the mean it would only add noise to the gradient of L_simple.
        vb = self._vb_of_prediction(prediction.detach(), values, x_start, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000.0)
        return dict(mse=mse, vb=vb, loss=mse + vb)

    def _vb_of_prediction(self, prediction, values, x_start, x_t, t):
        pred_xstart = self._pred_xstart(prediction, x_t, t)
        return self._vb_terms_bpd(pred_xstart, self._log_variance(values, x_t, t), x_start, x_t, t)

    def _vb_terms_bpd(self, pred_xstart, log_variance, x_start, x_t, t):
        """Compute one term of the bound for each sample (DDPM, eq. 5), in bits per dimension, shape (N,).

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0: -log p(x_0 | x_1).
        """
        mean = self._posterior_mean(pred_xstart, x_t, t)
        true_mean = self._posterior_mean(x_start, x_t, t)
        (true_log_variance,) = self._extract(t, x_t.ndim, "posterior_log_variance_clipped")
        vb = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))
        if _may_contain_zero(t):
            nll = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
            vb = torch.where(t == 0, mean_flat(nll), vb)
        return vb / math.log(2.0)

    # ---------------------------------------------------------------- p: the reverse process

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Compute the reverse step p(x_{t-1} | x_t) that the model gives.

        Returns:
            dict[str, Tensor]: "mean", "variance", "log_variance" and "pred_xstart", each of the shape of x.
        """
        mean, log_variance, pred_xstart = self._reverse_step(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        is_learned = self.variance == "learned_range"
        variance = torch.exp(log_variance) if is_learned else self._extract(t, x.ndim, "fixed_variance")[0]
        return dict(mean=mean, variance=variance.expand_as(x), log_variance=log_variance.expand_as(x),
                    pred_xstart=pred_xstart)

    def _reverse_step(self, model, x, t, clip_denoised, denoised_fn, model_kwargs):
        """Return the mean, a log variance that broadcasts to its shape, and the predicted x_0."""
        prediction, values = self._split_output(model(x, self._original_t(t), **(model_kwargs or {})), x)
        pred_xstart = self._pred_xstart(prediction, x, t, clip_denoised, denoised_fn)
        return self._posterior_mean(pred_xstart, x, t), self._log_variance(values, x, t), pred_xstart

    def _split_output(self, output, x):
        """Split the model's output into the prediction and the variance values (None if the variance is fixed)."""
        learned = self.variance == "learned_range"
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(f"the model returned shape {tuple(output.shape)} for an input of {tuple(x.shape)}; "
                             f"with {'a learned' if learned else 'a fixed'} variance it must return {expected}")
        return output.chunk(2, dim=1) if learned else (output, None)

    def _pred_xstart(self, prediction, x_t, t, clip_denoised=False, denoised_fn=None):
        """Compute the x_0 that a prediction (of x_0 or of the noise) implies."""
        x_0 = prediction if self.predict_xstart else self._predict_xstart_from_eps(x_t, t, prediction)
        if denoised_fn is not None:
            x_0 = denoised_fn(x_0)
        return x_0.clamp(-1, 1) if clip_denoised else x_0

    def _log_variance(self, values, x, t):
        """Compute log var = v log beta_t + (1 - v) log btilde_t, v = (values + 1) / 2 (Improved DDPM, eq. 15)."""
        if values is None:
            return self._extract(t, x.ndim, "fixed_log_variance")[0]
        log_beta, log_small = self._extract(t, x.ndim, "log_betas", "posterior_log_variance_clipped")
        # Promoted first: in bfloat16 v and 1 - v do not add up to 1, and for large t only this difference matters.
        values = values.to(torch.promote_types(values.dtype, log_beta.dtype))
        v = (values + 1).mul_(0.5)
        return _weighted_sum(log_beta, v, log_small, 1 - v)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        """Solve x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for x_0."""
        a, b = self._extract(t, x_t.ndim, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (a * x_t).sub_(b * eps)

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        """Solve x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps for eps."""
        a, b = self._extract(t, x_t.ndim, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
        return (a * x_t - pred_xstart) / b

    # ---------------------------------------------------------------- DDPM

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                 noise_fn=torch.randn_like):
        """Sample x_{t-1} ~ p(x_{t-1} | x_t) (DDPM, algorithm 2). Returns dict(sample, pred_xstart)."""
        if cond_fn is None:
            mean, log_variance, pred_xstart = self._reverse_step(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        else:
            step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
            mean = self.condition_mean(cond_fn, step, x, t, model_kwargs)
            log_variance, pred_xstart = step["log_variance"], step["pred_xstart"]
        (adds_noise,) = self._extract(t, x.ndim, "adds_noise")
        sigma = (0.5 * log_variance).exp_().mul_(adds_noise)
        return dict(sample=mean.add_(sigma * noise_fn(x)), pred_xstart=pred_xstart)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Return the mean of `p_mean_variance` plus variance * gradient (Dhariwal & Nichol, 2021, algorithm 1)."""
        gradient = cond_fn(x, self._original_t(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                      model_kwargs=None, device=None, progress=False, noise_fn=torch.randn_like):
        """Sample by DDPM from noise to x_0. Arguments as for `p_sample_loop_progressive`; returns the last sample."""
        return _last_sample(self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, noise_fn))

    def p_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                  model_kwargs=None, device=None, progress=False, noise_fn=torch.randn_like):
        """Sample by DDPM, yielding dict(sample, pred_xstart) after every step.

        `shape` is (N, C, ...); `noise` is x_T, by default drawn from the global generator; `device` is by default that
        of the noise or of the model; `progress` shows a tqdm bar.
        """
        return self._sample_loop(self.p_sample, model, shape, noise, device, progress, clip_denoised=clip_denoised,
                                 denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, noise_fn=noise_fn)

    def _sample_loop(self, sample_step, model, shape, noise, device, progress, **step_arguments):
        if device is None:
            device = next(model.parameters()).device if noise is None else noise.device
        x = torch.randn(*shape, device=device) if noise is None else noise
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"noise has shape {tuple(x.shape)}, but the samples have shape {tuple(shape)}")
        timesteps = torch.arange(self.num_timesteps, device=device)  # once: no copy to the device inside the loop
        for i in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            with torch.no_grad():
                out = sample_step(model, x, timesteps[i].expand(len(x)), **step_arguments)
            yield out
            x = out["sample"]

    # ---------------------------------------------------------------- DDIM

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                    eta=0.0, noise_fn=torch.randn_like):
        """Take one DDIM step (DDIM, eq. 12). Returns dict(sample, pred_xstart).

        With eta = 0 the step is deterministic; eta = 1 adds the noise of DDPM with the small fixed variance.
        """
        pred_xstart = self._ddim_pred_xstart(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar, previous, adds_noise = self._extract(
            t, x.ndim, "alphas_cumprod", "alphas_cumprod_prev", "adds_noise")
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / previous)
        mean = pred_xstart * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * eps
        return dict(sample=mean + sigma * adds_noise * noise_fn(x), pred_xstart=pred_xstart)

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                            eta=0.0):
        """Take one DDIM step towards noise, x_t -> x_{t+1}, for eta = 0 only. Returns dict(sample, pred_xstart)."""
        if eta:
            raise ValueError(f"only deterministic DDIM can be reversed: eta must be 0, not {eta}")
        pred_xstart = self._ddim_pred_xstart(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        (following,) = self._extract(t, x.ndim, "alphas_cumprod_next")
        return dict(sample=pred_xstart * torch.sqrt(following) + torch.sqrt(1 - following) * eps,
                    pred_xstart=pred_xstart)

    def _ddim_pred_xstart(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
        """Predict x_0, with classifier guidance if there is a cond_fn."""
        if cond_fn is None:
            prediction, _ = self._split_output(model(x, self._original_t(t), **(model_kwargs or {})), x)
            return self._pred_xstart(prediction, x, t, clip_denoised, denoised_fn)
        step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return self.condition_score(cond_fn, step, x, t, model_kwargs)["pred_xstart"]

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Return `p_mean_variance` with eps minus sqrt(1 - alpha_bar) * gradient (Dhariwal & Nichol, algorithm 2)."""
        gradient = cond_fn(x, self._original_t(t), **(model_kwargs or {}))
        (sigma,) = self._extract(t, x.ndim, "sqrt_one_minus_alphas_cumprod")
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"]) - sigma * gradient
        pred_xstart = self._predict_xstart_from_eps(x, t, eps)
        return dict(p_mean_var, pred_xstart=pred_xstart, mean=self._posterior_mean(pred_xstart, x, t))

    def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                         model_kwargs=None, device=None, progress=False, eta=0.0, noise_fn=torch.randn_like):
        """Sample by DDIM from noise to x_0. Arguments as for `p_sample_loop_progressive`, eta as for `ddim_sample`."""
        return _last_sample(self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta, noise_fn))

    def ddim_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None,
                                     cond_fn=None, model_kwargs=None, device=None, progress=False, eta=0.0,
                                     noise_fn=torch.randn_like):
        """Sample by DDIM, yielding dict(sample, pred_xstart) after every step. Arguments as for `ddim_sample_loop`."""
        return self._sample_loop(self.ddim_sample, model, shape, noise, device, progress, clip_denoised=clip_denoised,
                                 denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta,
                                 noise_fn=noise_fn)

    # ---------------------------------------------------------------- the variational bound

    @torch.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, noise_fn=torch.randn_like):
        """Compute the full variational bound in bits per dimension, with its T terms (DDPM, eq. 5).

        Returns:
            dict[str, Tensor]: "total_bpd" and "prior_bpd", shape (N,); and of shape (N, T), from t = T - 1 to t = 0,
                "vb" (bits), "xstart_mse" (error of the predicted x_0) and "mse" (error of the predicted noise).
        """
        timesteps = torch.arange(self.num_timesteps, device=x_start.device)
        columns = dict(vb=[], xstart_mse=[], mse=[])
        for i in reversed(range(self.num_timesteps)):
            t = timesteps[i].expand(len(x_start))
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            _, log_variance, pred_xstart = self._reverse_step(model, x_t, t, clip_denoised, None, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, pred_xstart)
            columns["vb"].append(self._vb_terms_bpd(pred_xstart, log_variance, x_start, x_t, t))
            columns["xstart_mse"].append(mean_flat((pred_xstart - x_start).square()))
            columns["mse"].append(mean_flat((eps - noise).square()))
        terms = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior_bpd = self._prior_bpd(x_start)
        return dict(total_bpd=terms["vb"].sum(dim=1) + prior_bpd, prior_bpd=prior_bpd, **terms)

    def _prior_bpd(self, x_start):
        """Compute KL(q(x_T | x_0) || N(0, I)), the term without a model, in bits per dimension, shape (N,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


def _weighted_sum(a, x, b, y):
    """Compute a x + b y with one temporary: for large tensors, allocation costs more than arithmetic."""
    return (a * x).add_(b * y)


def _check_same_shape(name, tensor, other_name, other):
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {other_name} has {tuple(other.shape)}: "
                         "they must be equal")


def _may_contain_zero(t):
    # The likelihood costs as much as all else and serves one sample in T. Only timesteps in host memory can be read
    # without making the step wait for the device.
    return t.device.type != "cpu" or torch.compiler.is_compiling() or bool((t == 0).any())


def _last_sample(outputs):
    for out in outputs:
        sample = out["sample"]
    return sample
