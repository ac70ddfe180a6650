"""Training losses and the variational bound."""
import math

import torch

from .likelihood import discretized_gaussian_log_likelihood, mean_flat, normal_kl


class Objectives:
    """Losses of a `Process`, each a value a sample."""

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The loss of the paper: L_simple + L_vlb (section 3.1; Improved DDPM, section 3.1).

        x_start, t, noise  as for `q_sample`; model, model_kwargs as for `p_mean_variance`
        return             dictionary of (N,) tensors: loss, and by the kind of loss
                           "mse"           mse, and with a learned variance vb (bits per dimension); loss is the sum
                           "rescaled_mse"  the same with vb times T / 1000
                           "kl"            nothing else; loss is vb times T, an estimate of the whole bound
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        prediction, values = self._split_output(model(x_t, self._original_t(t), **(model_kwargs or {})), x_t)
        if self.loss == "kl":
            return dict(loss=self._bound(prediction, values, x_start, x_t, t) * self.num_timesteps)
        target = x_start if self.predict_xstart else noise
        terms = dict(mse=mean_flat((target - prediction).square()))
        if values is None:
            return dict(terms, loss=terms["mse"])
        # The bound trains the variance alone: through the mean it would only add noise to L_simple's gradient.
        vb = self._bound(prediction.detach(), values, x_start, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000.0)
        return dict(terms, vb=vb, loss=terms["mse"] + vb)

    def _bound(self, prediction, values, x_start, x_t, t):
        pred_xstart = self._pred_xstart(prediction, x_t, t)
        return self._vb_terms_bpd(pred_xstart, self._log_variance(values, x_t, t), x_start, x_t, t)

    def _vb_terms_bpd(self, pred_xstart, log_variance, x_start, x_t, t):
        """One term of the bound (DDPM, eq. 5) for each sample, (N,), in bits per dimension.

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0: -log p(x_0 | x_1).
        """
        mean = self._posterior_mean(pred_xstart, x_t, t)
        true_mean = self._posterior_mean(x_start, x_t, t)
        (true_log_variance,) = self._at(t, x_t.ndim, "posterior_log_variance_clipped")
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        vb = mean_flat(kl)
        if _may_hold_zero(t):
            nll = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
            vb = torch.where(t == 0, mean_flat(nll), vb)
        return vb / math.log(2.0)

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, I)) for each sample, (N,), in bits per dimension: what no training can change."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)

    @torch.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, noise_fn=torch.randn_like):
        """The whole variational bound in bits per dimension (DDPM, eq. 5), with its T terms.

        return  dictionary: total_bpd (N,), prior_bpd (N,), and of shape (N, T), from t = T - 1 (first column) to t = 0:
                vb (bits), xstart_mse (error of the predicted x_0), mse (error of the predicted noise)
        """
        timesteps = torch.arange(self.num_timesteps, device=x_start.device)
        rows = dict(vb=[], xstart_mse=[], mse=[])
        for i in range(self.num_timesteps - 1, -1, -1):
            t = timesteps[i].expand(len(x_start))
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise)
            _, log_variance, pred_xstart = self._reverse_step(model, x_t, t, clip_denoised, None, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, pred_xstart)
            rows["vb"].append(self._vb_terms_bpd(pred_xstart, log_variance, x_start, x_t, t))
            rows["xstart_mse"].append(mean_flat((pred_xstart - x_start).square()))
            rows["mse"].append(mean_flat((eps - noise).square()))
        terms = {name: torch.stack(values, dim=1) for name, values in rows.items()}
        prior_bpd = self._prior_bpd(x_start)
        return dict(total_bpd=terms["vb"].sum(dim=1) + prior_bpd, prior_bpd=prior_bpd, **terms)


def _may_hold_zero(t):
    # The likelihood costs as much as all the rest and is used by one sample in T. In host memory t can be looked at;
    # elsewhere that would make the step wait for its device.
    return t.device.type != "cpu" or torch.compiler.is_compiling() or bool((t == 0).any())
