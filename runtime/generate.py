"""The one piece of code that makes images: from labels and noise, by a model, a codec and a diffusion process."""
import copy
import json
from dataclasses import dataclass

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.utils import make_grid

from diffusion import create_diffusion
from models import default_cfg_channels

from .errors import UserError
from .randomness import SAMPLE_NOISE, generator
from .speed import PLAIN, RoundedOnce, Speed


class GlobalNoise:
    """Noise of the global generator in the published order: x_T of N samples, then at every step a draw for the doubled
    batch of guidance, of which the first half is used. So a seed gives the picture that it gave with published code,
    also at guidance scale 1, where the second half of the network's batch is not computed.
    """

    def __init__(self, seed, device):
        torch.manual_seed(seed)
        self.device = device

    def initial(self, shape):
        return torch.randn(shape, device=self.device)

    def step(self, x):
        return torch.randn(2 * len(x), *x.shape[1:], device=x.device)[: len(x)]


class SampleNoise:
    """Noise of each sample from a generator of its own: sample i is a function of (seed, i), whatever its batch.

    stream  of `runtime.randomness`: what the noise is for
    """

    def __init__(self, seed, indices, device, stream=SAMPLE_NOISE):
        self.generators = [generator(seed, stream, int(i), device=device) for i in indices]
        self.device = device

    def initial(self, shape):
        # Not like another tensor: where that lies in memory channels last, numbers would come in another order.
        noise = torch.empty(shape, device=self.device)
        for row, own in zip(noise, self.generators):
            row.normal_(generator=own)
        return noise

    def step(self, x):
        return self.initial(x.shape)


def image_maker(model, codec, num_steps, cfg_scale, cfg_channels=None, cfg_interval=None, sampler=None, eta=0.0,
                speed=PLAIN):
    """An `ImageMaker`, from what the sampling flags say."""
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
    return ImageMaker(model, codec, diffusion, cfg_scale, guided, cfg_interval, sampler, eta, speed)


@dataclass
class ImageMaker:
    """Turns labels and noise into images.

    model         a DiT in evaluation mode
    codec         from `runtime.latents`
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
    codec: object
    diffusion: object
    cfg_scale: float = 1.0
    cfg_channels: int = None
    cfg_interval: tuple = None
    sampler: str = "ddpm"
    eta: float = 0.0
    speed: Speed = PLAIN

    def __post_init__(self):
        self.largest = 0
        if self.cfg_scale < 1:
            raise UserError(f"--cfg-scale {self.cfg_scale:g}: guidance starts at 1, which means none")
        if self.cfg_scale > 1 and not self.model.y_embedder.has_null_class:
            raise UserError(f"--cfg-scale {self.cfg_scale:g}: this model was trained without label dropout and has no "
                            "null class to guide away from; pass --cfg-scale 1")
        if self.speed.precision == "bf16" and next(self.model.parameters()).device.type != "meta":
            self.network = RoundedOnce(self.model, self.speed)
        else:
            own = copy.copy(self.model)  # with the same weights, but compiled or not for itself
            self.speed.set_up(own)
            self.network = lambda: own

    def is_guided(self, timestep):
        """Whether there is guidance at this timestep of the trained process."""
        low, high = self.cfg_interval or (timestep, timestep)
        return self.cfg_scale > 1 and low <= timestep <= high

    def record(self):
        """What makes these images what they are, beside weights and noise."""
        steps = self.diffusion.num_timesteps
        interval = dict(cfg_interval=list(self.cfg_interval)) if self.cfg_interval else {}
        return dict(sampler=self.sampler, steps=steps,
                    model_calls=steps + sum(map(self.is_guided, self.diffusion.timestep_map)),
                    eta=self.eta, cfg_scale=self.cfg_scale, cfg_channels=self.cfg_channels, **interval,
                    in_channels=self.model.in_channels, precision=self.speed.precision)

    @torch.no_grad()
    def __call__(self, labels, noise, on_step=None, progress=False):
        """Make one image a label.

        labels   (N,) on the model's device
        noise    `GlobalNoise` or `SampleNoise`
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
        return self.codec.decode(x)

    def _denoiser(self, labels):
        """What the sampler calls, once a step, from the last timestep to the first: (x, t) -> the output, guided."""
        rows = self.largest if self.speed.compile else len(labels)
        model, labels = self.network(), padded(labels, rows)
        plain, guided = self.speed.of(model), self.speed.of(model.forward_with_cfg)
        # From the host's own list: asking the device which timestep it is at would make every step wait for it.
        timesteps = iter(reversed(list(self.diffusion.timestep_map)))
        both = torch.cat([labels, torch.full_like(labels, model.y_embedder.num_classes)])

        def denoiser(x, t):
            n, x, t = len(x), padded(x, rows), padded(t, rows)
            if not self.is_guided(next(timesteps)):
                return plain(x, t, labels)[:n]
            double_x, double_t = (values.repeat(2, *(1,) * (values.ndim - 1)) for values in (x, t))
            return guided(double_x, double_t, both, self.cfg_scale, self.cfg_channels)[:n]

        return denoiser


def preview(model, codec, class_names, columns=4):
    """Samples of up to ten classes, one a row: images (N, C, H, W), and the number of columns.

    DDIM in 50 steps, guided as sample.py does; the same noise every time, so that grids can be compared.
    """
    classes = torch.linspace(0, len(class_names) - 1, min(10, len(class_names))).long()
    labels = classes.repeat_interleave(columns).to(model.pos_embed.device)
    make = image_maker(model, codec, "ddim50", cfg_scale=4.0 if model.y_embedder.has_null_class else 1.0)
    return make(labels, SampleNoise(0, range(len(labels)), labels.device)), columns


def padded(values, rows):
    """(N, ...) -> (rows, ...), the last one repeated: a compiled network sees batches of one size only."""
    if len(values) == rows:
        return values
    return torch.cat([values, values[-1:].expand(rows - len(values), *values.shape[1:])])


UINT8_RULE = "clamp(127.5 x + 128, 0, 255), truncated"


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> (N, H, W, 3) uint8 by the rule of published sample sets: 127.5 x + 128, truncated.

    One channel is repeated to three. raise: UserError for what is not finite, which would come out black.
    """
    if not torch.isfinite(images).all():
        raise UserError("the model makes images that are not finite: its weights are spoilt")
    images = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return images.expand(*images.shape[:3], 3) if images.shape[3] == 1 else images


# Tiles of tiny images are enlarged to this, so that a person can see them.
SMALLEST_TILE = 64


def image_grid(images, columns):
    """(N, C, H, W) in [-1, 1] -> one (3, H', W') image in [0, 1], `columns` images a row."""
    enlarge = max(1, SMALLEST_TILE // images.shape[-1])
    images = images.float().cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    return make_grid(images, nrow=columns, normalize=True, value_range=(-1, 1))


def save_grid(images, columns, path, record=None):
    """Write images (N, C, H, W) in [-1, 1] as one picture, `columns` a row.

    record  a dictionary to keep inside a PNG, as its text "DiT"
    """
    picture, info = to_picture(image_grid(images, columns)), PngInfo()
    if record:
        info.add_text("DiT", json.dumps(record))
    try:
        picture.save(path, pnginfo=info)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {path}: {error}") from None


def to_picture(grid):
    """(3, H, W) in [0, 1] -> a PIL image, rounded to 8 bits as the published picture is."""
    return Image.fromarray((grid * 255 + 0.5).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy())


class PathRecorder:
    """Keeps x_t at about `frames` moments of a sampling run (an `on_step` of `ImageMaker`), to show as an animation."""

    def __init__(self, num_steps, frames=50):
        self.kept = {round(i) - 1 for i in torch.linspace(0, num_steps, min(frames, num_steps) + 1).tolist()}
        self.latents = []

    def __call__(self, step, x):
        if step in self.kept:
            self.latents.append(x)

    def save(self, codec, columns, path, milliseconds=60):
        """Decode the kept latents and write an animated GIF that rests on its last frame."""
        frames = [to_picture(image_grid(codec.decode(x), columns)) for x in self.latents]
        try:
            frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                           duration=[milliseconds] * (len(frames) - 1) + [2000])
        except OSError as error:
            raise UserError(f"cannot write the animation {path}: {error}") from None
