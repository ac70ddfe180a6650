"""The one piece of code that makes images: from labels and noise, by a model, a codec and a diffusion process."""

import copy
from dataclasses import dataclass

import torch

from common.compute import DEFAULT_COMPUTE, Bf16InferenceModel, ComputeConfig
from common.errors import UserError
from diffusion import create_diffusion
from models import default_cfg_channels
from sampling.noise import PerSampleRNG


def build_pipeline(model, autoencoder, num_steps, cfg_scale, cfg_channels=None, cfg_interval=None, sampler=None, eta=0.0,
                compute=DEFAULT_COMPUTE):
    """An `SamplingPipeline`, from what the sampling flags say."""
    try:
        diffusion = create_diffusion(str(num_steps), learn_sigma=model.learn_sigma)
    except ValueError as error:
        raise UserError(f"--num-sampling-steps {num_steps}: {error}") from None
    in_channels = model.in_channels
    guided = in_channels if cfg_channels == "all" else cfg_channels or default_cfg_channels(in_channels)
    if guided > in_channels:
        raise UserError(f"--cfg-channels {guided}: the latents of this model have {in_channels} channels")
    sampler = sampler or ("ddim" if str(num_steps).startswith("ddim") else "ddpm")
    if eta and sampler != "ddim":
        raise UserError(f"--eta {eta:g} is DDIM's noise: pass --sampler ddim with it")
    if cfg_interval and cfg_interval[0] > cfg_interval[1]:
        raise UserError(f"--cfg-interval {cfg_interval[0]} {cfg_interval[1]}: the lower timestep comes first")
    return SamplingPipeline(model, autoencoder, diffusion, cfg_scale, guided, cfg_interval, sampler, eta, compute)


@dataclass
class SamplingPipeline:
    """Turns labels and noise into images.

    model         a DiT in evaluation mode
    codec         from `autoencoder.vae`
    diffusion     the process to sample with, respaced
    cfg_scale     guidance: 1 for none (one pass of the network a step, not two)
    cfg_channels  how many latent channels are guided; None: the model's default
    cfg_interval  (lowest, highest) timestep, of 0 .. 999, at which there is guidance; None: at all of them
                  (Kynkaanniemi et al., "Applying Guidance in a Limited Interval ...", 2024)
    sampler       "ddpm" or "ddim"
    eta           DDIM's noise: 0 is deterministic
    speed         how the network is computed; in bf16 by a copy of the model (but not of a sharded one, which gets its
                  weights later: there is no room for two)
    """

    model: torch.nn.Module
    autoencoder: object
    diffusion: object
    cfg_scale: float = 1.0
    cfg_channels: int = None
    cfg_interval: tuple = None
    sampler: str = "ddpm"
    eta: float = 0.0
    compute: ComputeConfig = DEFAULT_COMPUTE

    def __post_init__(self):
        self.largest = 0
        if self.cfg_scale < 1:
            raise UserError(f"--cfg-scale {self.cfg_scale:g}: guidance starts at 1, which means none")
        if self.cfg_scale > 1 and not self.model.y_embedder.has_null_class:
            raise UserError(f"--cfg-scale {self.cfg_scale:g}: this model was trained without label dropout and has no "
                            "null class to guide away from; pass --cfg-scale 1")
        if self.compute.precision == "bf16" and next(self.model.parameters()).device.type != "meta":
            self.network = Bf16InferenceModel(self.model, self.compute)
        else:
            own = copy.copy(self.model)  # with the same weights, but compiled or not for itself
            self.compute.set_up(own)
            self.network = lambda: own

    def is_guided(self, timestep):
        """Whether there is guidance at this timestep of the trained process."""
        low, high = self.cfg_interval or (timestep, timestep)
        return self.cfg_scale > 1 and low <= timestep <= high

    def metadata(self):
        """What makes these images what they are, beside weights and noise."""
        steps = self.diffusion.num_timesteps
        interval = dict(cfg_interval=list(self.cfg_interval)) if self.cfg_interval else {}
        return dict(sampler=self.sampler, steps=steps,
                    model_calls=steps + sum(map(self.is_guided, self.diffusion.timestep_map)),
                    eta=self.eta, cfg_scale=self.cfg_scale, cfg_channels=self.cfg_channels, **interval,
                    in_channels=self.model.in_channels, precision=self.compute.precision)

    @torch.no_grad()
    def __call__(self, labels, noise, on_step=None, progress=False):
        """Make one image a label.

        labels   (N,) on the model's device
        noise    `GlobalRNG` or `PerSampleRNG`
        on_step  called with (step, x_t) after each step, and with (-1, x_T) before the first
        return   (N, C, H, W) float32, about [-1, 1]
        """
        self.largest = max(self.largest, len(labels))
        shape = (len(labels), self.model.in_channels, *self.model.x_embedder.input_size)
        loop = (self.diffusion.ddim_sample_loop_progressive if self.sampler == "ddim"
                else self.diffusion.p_sample_loop_progressive)
        extra = dict(eta=self.eta) if self.sampler == "ddim" else {}
        x = noise.initial(shape)
        if on_step:
            on_step(-1, x)
        for step, out in enumerate(loop(self._denoiser(labels), shape, x, clip_denoised=False, progress=progress,
                                        device=labels.device, noise_fn=noise.step, **extra)):
            x = out["sample"]
            if on_step:
                on_step(step, x)
        return self.autoencoder.decode(x)

    def _denoiser(self, labels):
        """What the sampler calls, once a step, from the last timestep to the first: (x, t) -> the output, guided."""
        rows = self.largest if self.compute.compile else len(labels)
        model, labels = self.network(), pad_batch(labels, rows)
        plain, guided = self.compute.of(model), self.compute.of(model.forward_with_cfg)
        # From the host's own list: asking the device which timestep it is at would make every step wait for it.
        timesteps = iter(reversed(list(self.diffusion.timestep_map)))
        both = torch.cat([labels, torch.full_like(labels, model.y_embedder.num_classes)])

        def denoiser(x, t):
            n, x, t = len(x), pad_batch(x, rows), pad_batch(t, rows)
            if not self.is_guided(next(timesteps)):
                return plain(x, t, labels)[:n]
            double_x, double_t = (values.repeat(2, *(1,) * (values.ndim - 1)) for values in (x, t))
            return guided(double_x, double_t, both, self.cfg_scale, self.cfg_channels)[:n]

        return denoiser


def sample_preview(model, autoencoder, class_names, columns=4):
    """Samples of up to ten classes, one a row: images (N, C, H, W), and the number of columns.

    DDIM in 50 steps, guided as sample.py does; the same noise every time, so that grids can be compared.
    """
    classes = torch.linspace(0, len(class_names) - 1, min(10, len(class_names))).long()
    labels = classes.repeat_interleave(columns).to(model.pos_embed.device)
    make = build_pipeline(model, autoencoder, "ddim50", cfg_scale=4.0 if model.y_embedder.has_null_class else 1.0)
    return make(labels, PerSampleRNG(0, range(len(labels)), labels.device)), columns


def pad_batch(values, rows):
    """(N, ...) -> (rows, ...), the last one repeated: a compiled network sees batches of one size only."""
    if len(values) == rows:
        return values
    return torch.cat([values, values[-1:].expand(rows - len(values), *values.shape[1:])])
