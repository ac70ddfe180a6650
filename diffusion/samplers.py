"""Samplers: from noise to x_0 (DDPM, DDIM) and back (DDIM inversion)."""
import torch


class Samplers:
    """One-step samplers and the loops over them, for a `Process`.

    Arguments that all share: model, x, t, clip_denoised, denoised_fn, model_kwargs as in `Process.p_mean_variance`;
    cond_fn  classifier guidance, as in `Process.condition_mean`;
    noise_fn  callable (x) -> standard normal of x's shape, called exactly once a step, also where the step then adds
              none of it: so one seed gives one picture whatever the sampler's eta. Default: `torch.randn_like`.
    """

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                 noise_fn=torch.randn_like):
        """One DDPM step: x_{t-1} ~ p(x_{t-1} | x_t) (DDPM, algorithm 2). Returns dict(sample, pred_xstart)."""
        if cond_fn is None:
            mean, log_variance, pred_xstart = self._reverse_step(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        else:
            step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
            mean = self.condition_mean(cond_fn, step, x, t, model_kwargs)
            log_variance, pred_xstart = step["log_variance"], step["pred_xstart"]
        (adds_noise,) = self._at(t, x.ndim, "adds_noise")
        sigma = (0.5 * log_variance).exp_().mul_(adds_noise)
        return dict(sample=mean.add_(sigma * noise_fn(x)), pred_xstart=pred_xstart)

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                    eta=0.0, noise_fn=torch.randn_like):
        """One DDIM step (DDIM, eq. 12). Returns dict(sample, pred_xstart).

        eta  0: deterministic; 1: the noise of DDPM with the fixed small variance
        """
        pred_xstart = self._denoise(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar, previous, adds_noise = self._at(t, x.ndim, "alphas_cumprod", "alphas_cumprod_prev", "adds_noise")
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / previous)
        mean = pred_xstart * torch.sqrt(previous) + torch.sqrt(1 - previous - sigma**2) * eps
        return dict(sample=mean + sigma * adds_noise * noise_fn(x), pred_xstart=pred_xstart)

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                            eta=0.0):
        """One DDIM step towards noise, x_t -> x_{t+1}: the ODE run backwards. Returns dict(sample, pred_xstart)."""
        if eta != 0.0:
            raise ValueError(f"DDIM can be reversed only where it is deterministic: eta must be 0, not {eta}")
        pred_xstart = self._denoise(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        (following,) = self._at(t, x.ndim, "alphas_cumprod_next")
        return dict(sample=pred_xstart * torch.sqrt(following) + torch.sqrt(1 - following) * eps,
                    pred_xstart=pred_xstart)

    def _denoise(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
        """The predicted x_0, with classifier guidance if there is a cond_fn: all that DDIM needs of the network."""
        if cond_fn is None:
            prediction, _ = self._split_output(model(x, self._original_t(t), **(model_kwargs or {})), x)
            return self._pred_xstart(prediction, x, t, clip_denoised, denoised_fn)
        step = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return self.condition_score(cond_fn, step, x, t, model_kwargs)["pred_xstart"]

    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                      model_kwargs=None, device=None, progress=False, noise_fn=torch.randn_like):
        """DDPM from pure noise to x_0. Arguments as for `p_sample_loop_progressive`; returns the last sample."""
        return _last(self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, noise_fn))

    def p_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                  model_kwargs=None, device=None, progress=False, noise_fn=torch.randn_like):
        """DDPM, yielding every step's dict(sample, pred_xstart).

        shape     (N, C, ...) of the samples
        noise     x_T; drawn from the global generator on `device` if None
        device    default: the model's
        progress  show a tqdm bar
        """
        yield from self._loop(self.p_sample, model, shape, noise, device, progress, clip_denoised=clip_denoised,
                              denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, noise_fn=noise_fn)

    def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                         model_kwargs=None, device=None, progress=False, eta=0.0, noise_fn=torch.randn_like):
        """DDIM from pure noise to x_0. Arguments as for `p_sample_loop_progressive`, and eta as for `ddim_sample`."""
        return _last(self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta, noise_fn))

    def ddim_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None,
                                     cond_fn=None, model_kwargs=None, device=None, progress=False, eta=0.0,
                                     noise_fn=torch.randn_like):
        """DDIM, yielding every step's dict(sample, pred_xstart); arguments as for `ddim_sample_loop`."""
        yield from self._loop(self.ddim_sample, model, shape, noise, device, progress, clip_denoised=clip_denoised,
                              denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, eta=eta,
                              noise_fn=noise_fn)

    def _loop(self, step, model, shape, noise, device, progress, **step_arguments):
        if device is None:
            device = next(model.parameters()).device if noise is None else noise.device
        x = torch.randn(*shape, device=device) if noise is None else noise
        if tuple(x.shape) != tuple(shape):
            raise ValueError(f"noise has shape {tuple(x.shape)}, the samples are to have {tuple(shape)}")
        timesteps = torch.arange(self.num_timesteps, device=device)  # made once: no copy to the device inside the loop
        steps = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm
            steps = tqdm(steps)
        for i in steps:
            with torch.no_grad():
                out = step(model, x, timesteps[i].expand(len(x)), **step_arguments)
            yield out
            x = out["sample"]


def _last(outputs):
    for out in outputs:
        sample = out["sample"]
    return sample
