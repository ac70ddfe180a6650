"""Pipeline for a DiT that was exported by convert.py. This file is copied into the exported folder as pipeline.py.

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    images = pipeline([88, 207], guidance_scale=4.0, num_inference_steps=50).images

It imports diffusers alone. Other than diffusers' DiTPipeline it computes what the DiT was trained with: sinusoids of
timesteps without a shift of their frequencies, guidance of the channels that were chosen, any number of classes, and
any scale and shift of the latents.
"""
import torch
from diffusers import DiTPipeline
from diffusers.utils.torch_utils import randn_tensor


class ExportedDiTPipeline(DiTPipeline):
    """Sample images of classes from a DiT.

    Args:
        transformer (DiTTransformer2DModel): The network.
        vae (AutoencoderKL): Decodes its latents; None if the network works on pixels.
        scheduler (SchedulerMixin): The sampler, as of all pipelines.
        id2label (dict): {number of a class, as text: name}.
        guided_channels (int): Number of latent channels that guidance applies to.
        latent_scale (float | list): Latents of the network are (latents of the VAE - latent_shift) * latent_scale.
        latent_shift (float | list): See above; one number, or one per channel.
    """

    _optional_components = ["vae"]  # noqa: RUF012 (diffusers reads a list)

    def __init__(self, transformer, vae, scheduler, id2label=None, guided_channels=3, latent_scale=1.0,
                 latent_shift=0.0):
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_to_config(id2label=id2label, guided_channels=guided_channels, latent_scale=latent_scale,
                                latent_shift=latent_shift)
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    @torch.no_grad()
    def __call__(self, class_labels, guidance_scale=4.0, generator=None, num_inference_steps=50, output_type="pil",
                 return_dict=True, latents=None):
        """Sample one image for each class.

        Args:
            class_labels (list[int]): Numbers of classes; `get_label_ids` finds them by name.
            guidance_scale (float): 1: none.
            generator (torch.Generator): Source of the noise, or a list with one per image.
            num_inference_steps (int): Sampling steps.
            output_type (str): "pil", "np" or "pt".
            return_dict (bool): Return an output of diffusers, or a tuple.
            latents (Tensor): Initial noise, shape (N, C, H, W). Default: drawn by `generator`.
        """
        network, device = self.transformer, self._execution_device
        size, channels = network.config.sample_size, network.config.in_channels
        labels = torch.as_tensor(class_labels, device=device).reshape(-1)
        shape = (len(labels), channels, size, size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=network.dtype) if latents is None else latents
        x = x.to(device, network.dtype) * self.scheduler.init_noise_sigma
        is_guided, null = guidance_scale > 1, torch.full_like(labels, network.config.num_embeds_ada_norm)
        inputs = torch.cat([labels, null]) if is_guided else labels
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(torch.cat([x, x]) if is_guided else x, t)
            eps = network(scaled, timestep=t.expand(len(scaled)), class_labels=inputs).sample[:, :channels]
            if is_guided:
                conditional, unconditional = eps.chunk(2)
                guided = self.config.guided_channels
                eps = conditional.clone()
                difference = (conditional - unconditional)[:, :guided]
                eps[:, :guided] = unconditional[:, :guided] + guidance_scale * difference
            x = self.scheduler.step(eps, t, x, return_dict=False)[0]
        images = (self._decode(x) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        from diffusers import ImagePipelineOutput

        return ImagePipelineOutput(images=images)

    def _decode(self, x):
        scale, shift = (torch.as_tensor(value, device=x.device, dtype=x.dtype).reshape(-1, 1, 1)
                        for value in (self.config.latent_scale, self.config.latent_shift))
        return x if self.vae is None else self.vae.decode(x / scale + shift).sample
