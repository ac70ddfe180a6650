"""From conditions and noise to images: the one sampling loop of the project, with classifier-free guidance."""
from dataclasses import dataclass

import torch

from autoencoder.vae import VAE, IdentityAutoencoder
from common.compute import DEFAULT_COMPUTE, Bf16InferenceModel, ComputeConfig, share_weights
from common.errors import ArgumentError, UserError
from diffusion import GaussianDiffusion, create_diffusion
from models import default_cfg_channels
from sampling.noise import PerSampleRNG
from sampling.solvers import SOLVERS, SolverProcess, parse_steps

NUM_TRAINED_TIMESTEPS = 1000
LARGE_CFG_SCALE = 20  # from which on values that are not finite are the fault of guidance


def build_pipeline(model, autoencoder, num_sampling_steps, cfg_scale, cfg_channels=None, cfg_interval=None,
                   sampler=None, eta=0.0, compute=DEFAULT_COMPUTE, timestep_spacing=None):
    """Build a `SamplingPipeline` from the values of the sampling flags; what does not fit raises an `ArgumentError`.

    Args (the others are attributes of `SamplingPipeline`):
        num_sampling_steps (int | str): Number of steps, "ddimN" for N evenly spaced steps of DDIM, or "dpmN", "unipcN",
            "heunN" for N steps of a solver.
        cfg_channels (int | str): Number of latent channels that are guided, or "all". Default: 3 of 4 as published,
            else all.
        sampler (str): A key of SAMPLERS. Default: that of the steps, such as "ddim" with "ddimN", else "ddpm".
        timestep_spacing (str): Of a solver, one of `sampling.solvers.SPACINGS`.
    """
    sampler = choose_sampler(sampler, num_sampling_steps)
    diffusion = build_process(num_sampling_steps, model.learn_sigma, sampler, timestep_spacing)
    in_channels = model.sample_shape[0]
    if cfg_channels == "all":
        cfg_channels = in_channels
    cfg_channels = cfg_channels or default_cfg_channels(in_channels)
    if cfg_channels > in_channels:
        raise ArgumentError(f"the latents of this model have {in_channels} channels.", cfg_channels=cfg_channels)
    if cfg_interval and cfg_interval[0] > cfg_interval[1]:
        raise ArgumentError("the lower timestep comes first.", cfg_interval=cfg_interval)
    if eta and sampler != "ddim":
        raise ArgumentError("this noise belongs to DDIM. Choose its sampler, ddim.", eta=eta)
    return SamplingPipeline(model, autoencoder, diffusion, cfg_scale, cfg_channels, cfg_interval, sampler, eta, compute)


def choose_sampler(sampler, num_sampling_steps):
    """Return the sampler's name; steps that name another one raise an `ArgumentError`."""
    named = "ddim" if str(num_sampling_steps).startswith("ddim") else parse_steps(num_sampling_steps)[0]
    if sampler and named and SOLVERS.keys() & {sampler, named} and sampler != named:
        raise ArgumentError(f"these are steps of {named}. Leave one of the two out.", sampler=sampler,
                            num_sampling_steps=num_sampling_steps)
    return sampler or named or "ddpm"


def build_process(num_sampling_steps, learn_sigma=True, sampler=None, timestep_spacing=None):
    """Build the `GaussianDiffusion`, or the `SolverProcess`, to sample with.

    Steps that are not possible raise an `ArgumentError`.
    """
    if sampler in SOLVERS:
        return SolverProcess(sampler, int(parse_steps(num_sampling_steps)[1]), timestep_spacing)
    if timestep_spacing:
        raise ArgumentError(f"the steps of {sampler} are those of the trained process. Choose a solver: "
                            f"{', '.join(SOLVERS)}.", timestep_spacing=timestep_spacing)
    count = str(num_sampling_steps).removeprefix("ddim")
    if count.isdecimal() and not 2 <= int(count[:9]) <= NUM_TRAINED_TIMESTEPS:
        problem = f"the process has {NUM_TRAINED_TIMESTEPS} steps, of which 2 or more can be sampled."
        if int(count[:9]) == 1:
            problem += " (A single one, that of t = 0, would return the noise that it starts from.)"
        raise ArgumentError(problem, num_sampling_steps=num_sampling_steps)
    try:
        return create_diffusion(str(num_sampling_steps), learn_sigma=learn_sigma)
    except ValueError as error:
        raise ArgumentError(f"{error}.", num_sampling_steps=num_sampling_steps) from None


@dataclass
class SamplingPipeline:
    """Sample images for given conditions from given noise."""

    model: torch.nn.Module                       # a DiT in evaluation mode
    autoencoder: VAE | IdentityAutoencoder       # decodes its latents
    diffusion: GaussianDiffusion | SolverProcess # the process to sample with, respaced
    cfg_scale: float = 1.0                       # guidance; 1: none, one pass of the network per step instead of two
    cfg_channels: int | None = None              # number of guided latent channels; default: that of the model
    # Lowest and highest timestep with guidance, of 0 .. 999; default: all. (Kynkaanniemi et al., "Applying Guidance in
    # a Limited Interval Improves Sample and Distribution Quality in Diffusion Models", 2024)
    cfg_interval: tuple[int, int] | None = None
    sampler: str = "ddpm"                        # a key of SAMPLERS
    eta: float = 0.0                             # noise of DDIM; 0: deterministic
    compute: ComputeConfig = DEFAULT_COMPUTE     # how the network is computed

    def __post_init__(self):
        self.max_batch_size = 0
        if self.cfg_scale < 1:
            raise ArgumentError("guidance starts at 1, which means none.", cfg_scale=self.cfg_scale)
        if self.cfg_scale > 1 and not self.model.has_null_condition:
            raise ArgumentError("this model was trained without label dropout and has no null class to guide away "
                                "from. Use 1, no guidance.", cfg_scale=self.cfg_scale)
        # A model on the meta device gets its weights later: under FSDP there is no room for a rounded copy of it.
        if self.compute.precision == "bf16" and self.model.device.type != "meta":
            self.network = Bf16InferenceModel(self.model, self.compute)
        else:
            network = share_weights(self.model)
            self.compute.prepare(network)
            self.network = lambda: network

    @torch.no_grad()
    def __call__(self, cond, noise, on_step=None, progress=False):
        """Sample one image for each condition.

        Args:
            cond (dict[str, Tensor]): Condition on the model's device, each of shape (N, ...): {"y": class labels}.
            noise (GlobalRNG | PerSampleRNG): Source of the noise.
            on_step (callable): Called with (step, x_t) after each step, and with (-1, x_T) before the first.
            progress (bool): Show a progress bar.

        Returns:
            Tensor: Images of about [-1, 1], float32, shape (N, C, H, W).
        """
        n = batch_size(cond)
        x = noise.initial((n, *self.model.sample_shape))
        if on_step:
            on_step(-1, x)
        for step, out in enumerate(SAMPLERS[self.sampler](self, self._build_denoiser(cond), x, noise, progress)):
            x = out["sample"]
            if on_step:
                on_step(step, x)
        images = self.autoencoder.decode(x)
        self._check_finite(x, images)
        return images

    def _check_finite(self, x, images):
        """Raise a `UserError` that names the cause if an image has NaN or infinite values, which come out black."""
        if torch.isfinite(images).all():
            return
        count = f"{sum(not torch.isfinite(image).all() for image in images)} of {len(images)} images"
        if torch.isfinite(x).all():
            raise ArgumentError(f"this autoencoder decodes {count} to values that are not finite. Use another one.",
                                vae=self.autoencoder.name)
        if self.cfg_scale > LARGE_CFG_SCALE:
            raise ArgumentError(f"with guidance this strong, {count} are not finite. Scales of 1 to 10 are usual.",
                                cfg_scale=self.cfg_scale)
        remedy = "Use another checkpoint" + (", or --precision fp32" if self.compute.precision != "fp32" else "")
        raise UserError(f"the model makes images that are not finite ({count}). {remedy}")

    def is_guided(self, timestep):
        """Return whether there is guidance at this timestep, of 0 .. 999."""
        low, high = self.cfg_interval or (timestep, timestep)
        return self.cfg_scale > 1 and low <= timestep <= high

    def _build_denoiser(self, cond):
        """Return what the sampler calls: (x, t) -> output, guided as its attribute `timestep` of the host says.

        To read `t` from the device would be a host sync at every step.
        """
        n = batch_size(cond)
        self.max_batch_size = max(self.max_batch_size, n)
        rows = self.max_batch_size if self.compute.compile else n  # a compiled network has one batch size
        cond = {name: pad_batch(values, rows) for name, values in cond.items()}
        null = self.model.null_condition(cond)
        cond_and_null = {name: torch.cat([values, null[name]]) for name, values in cond.items()}
        model = self.network()
        forward, forward_with_cfg = self.compute.wrap(model), self.compute.wrap(model.forward_with_cfg)

        def denoise(x, t):
            x, t = pad_batch(x, rows), pad_batch(t, rows)
            if not self.is_guided(denoise.timestep):
                return forward(x, t, **cond)[:n]
            return forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), **cond_and_null, cfg_scale=self.cfg_scale,
                                    cfg_channels=self.cfg_channels)[:n]

        return denoise

    def metadata(self):
        """Return all that determines the images apart from weights, conditions and noise; plain values."""
        num_steps = self.diffusion.num_timesteps
        more = dict(cfg_interval=list(self.cfg_interval)) if self.cfg_interval else {}
        if self.sampler in SOLVERS:
            more["timestep_spacing"] = self.diffusion.timestep_spacing
        timesteps = self.diffusion.timestep_map
        return dict(sampler=self.sampler, steps=num_steps,
                    model_calls=len(timesteps) + sum(map(self.is_guided, timesteps)),
                    eta=self.eta, cfg_scale=self.cfg_scale, cfg_channels=self.cfg_channels, **more,
                    in_channels=self.model.sample_shape[0], precision=self.compute.precision)


def _run_diffusion(loop, pipeline, denoise, x, noise, progress, **options):
    """Run a loop of `GaussianDiffusion`, telling the denoiser the timestep of each call."""
    timesteps = iter(reversed(pipeline.diffusion.timestep_map))
    denoise.timestep = next(timesteps)
    for out in loop(denoise, x.shape, x, clip_denoised=False, progress=progress, device=pipeline.model.device,
                    noise_fn=noise.step, **options):
        denoise.timestep = next(timesteps, None)
        yield out


def _run_ddpm(pipeline, *args):
    return _run_diffusion(pipeline.diffusion.p_sample_loop_progressive, pipeline, *args)


def _run_ddim(pipeline, *args):
    return _run_diffusion(pipeline.diffusion.ddim_sample_loop_progressive, pipeline, *args, eta=pipeline.eta)


def _run_solver(pipeline, denoise, x, noise, progress):
    return pipeline.diffusion.steps(denoise, x, progress)


# A sampler takes the pipeline, its denoiser, x_T, the source of noise, and whether to show progress; it yields a
# dict(sample) after every step, and sets the denoiser's `timestep` before each call. Names are those of --sampler.
SAMPLERS = {"ddpm": _run_ddpm, "ddim": _run_ddim} | dict.fromkeys(SOLVERS, _run_solver)


def batch_size(cond):
    """Return N of a condition, whose tensors have the shapes (N, ...)."""
    return len(next(iter(cond.values())))


def pad_batch(values, rows):
    """Repeat the last row of `values`, shape (N, ...), up to the shape (rows, ...)."""
    if len(values) == rows:
        return values
    return torch.cat([values, values[-1:].expand(rows - len(values), *values.shape[1:])])


def sample_preview(model, autoencoder, class_names, columns=4):
    """Sample a grid of up to ten classes, one per row, by 50 steps of guided DDIM.

    The noise is the same at every call, so that the grids of a training run can be compared.

    Returns:
        tuple[Tensor, int]: Images, shape (N, C, H, W), and the number of columns.
    """
    classes = torch.linspace(0, len(class_names) - 1, min(10, len(class_names))).long()
    labels = classes.repeat_interleave(columns).to(model.device)
    pipeline = build_pipeline(model, autoencoder, "ddim50", cfg_scale=4.0 if model.has_null_condition else 1.0)
    return pipeline(dict(y=labels), PerSampleRNG(0, range(len(labels)), model.device)), columns
