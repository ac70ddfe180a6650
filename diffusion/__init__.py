"""Gaussian diffusion: the process, its losses and its samplers.

    diffusion = create_diffusion("250")  # 250 of the 1000 trained steps
    latents = diffusion.p_sample_loop(model.eval(), shape, clip_denoised=False, model_kwargs=dict(y=labels))

Sources: DDPM (Ho et al., 2020, arXiv 2006.11239), Improved DDPM (Nichol & Dhariwal, 2021, arXiv 2102.09672),
DDIM (Song et al., 2020, arXiv 2010.02502), classifier guidance (Dhariwal & Nichol, 2021, arXiv 2105.05233).
"""
from .gaussian_diffusion import GaussianDiffusion
from .schedules import named_betas, respaced_betas, space_timesteps

__all__ = ["GaussianDiffusion", "create_diffusion"]


def create_diffusion(timestep_respacing, noise_schedule="linear", use_kl=False, sigma_small=False,
                     predict_xstart=False, learn_sigma=True, rescale_learned_sigmas=False, diffusion_steps=1000):
    """Build the process that a DiT is trained with or sampled from.

    Args:
        timestep_respacing (str | list[int] | None): Steps to keep of the trained ones: "" or None for all, "250",
            "ddim50", or a list such as "10,15,20" (steps in each equal section); see `space_timesteps`.
        noise_schedule (str): "linear" or "squaredcos_cap_v2".
        use_kl (bool): Train on the variational bound alone instead of the mean squared error.
        sigma_small (bool): With learn_sigma=False: fixed variance btilde_t instead of beta_t.
        predict_xstart (bool): The model predicts x_0 instead of the noise.
        learn_sigma (bool): The model predicts the variance too (Improved DDPM, eq. 15).
        rescale_learned_sigmas (bool): Multiply the variational part of the loss by (number of steps) / 1000.
        diffusion_steps (int): Length of the trained process.

    Returns:
        GaussianDiffusion: The process over the kept steps.

    Raises:
        ValueError: If the schedule is unknown or the respacing impossible.
    """
    betas = named_betas(noise_schedule, diffusion_steps)
    kept = space_timesteps(diffusion_steps, timestep_respacing or [diffusion_steps])
    return GaussianDiffusion(
        betas=respaced_betas(betas, kept),
        timestep_map=kept,
        original_num_steps=diffusion_steps,
        predict_xstart=predict_xstart,
        variance="learned_range" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss="kl" if use_kl else "rescaled_mse" if rescale_learned_sigmas else "mse",
    )
