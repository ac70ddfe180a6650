"""Noise schedules, and which steps of a schedule a shorter process keeps."""
import math

import numpy as np


def named_betas(name, num_steps):
    """The schedule beta_1 .. beta_T as a float64 array of `num_steps` values in (0, 1).

    "linear"             1e-4 .. 0.02 at 1000 steps (DDPM, section 4), scaled by 1000 / T at other lengths
    "squaredcos_cap_v2"  alpha_bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2) (Improved DDPM, eq. 17), beta <= 0.999
    """
    if num_steps < 1:
        raise ValueError(f"a diffusion process needs at least one step, not diffusion_steps={num_steps}")
    if name == "linear":
        scale = 1000 / num_steps
        if scale * 0.02 >= 1:
            raise ValueError(f"the linear schedule needs more than 20 steps, not diffusion_steps={num_steps}")
        return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if name == "squaredcos_cap_v2":
        def alpha_bar(s):
            return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.array([min(1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps), 0.999)
                         for i in range(num_steps)])
    raise ValueError(f"unknown noise schedule {name!r}: take 'linear' or 'squaredcos_cap_v2'")


def space_timesteps(num_timesteps, section_counts):
    """Choose the steps that a shorter process keeps.

    num_timesteps   length T of the full process
    section_counts  a count, a list of them, or "10,15,20": the process is cut in as many equal sections, each keeps
                    so many evenly spaced steps, its first and last included (Improved DDPM, section 4);
                    "ddimN": N steps at one integer stride from 0 (DDIM, appendix D.3)
    return          sorted list of integers in [0, T)
    raise           ValueError where that many steps cannot be had
    """
    if isinstance(section_counts, int):
        section_counts = [section_counts]
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _strided_timesteps(num_timesteps, _count(section_counts[len("ddim"):], section_counts))
        section_counts = [_count(count, section_counts) for count in section_counts.split(",")]
    size, longer = divmod(num_timesteps, len(section_counts))
    kept, start = [], 0
    for i, count in enumerate(section_counts):
        length = size + (1 if i < longer else 0)
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} steps of a section of {length} (respacing {section_counts} "
                             f"of {num_timesteps} steps)")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # The position is summed up, not multiplied: where it falls half-way between two steps, the rounding error
        # of the sum decides which is kept, and the published respacings were made so.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _strided_timesteps(num_timesteps, count):
    for stride in range(1, num_timesteps + 1):
        kept = list(range(0, num_timesteps, stride))
        if len(kept) == count:
            return kept
    raise ValueError(f"no integer stride gives 'ddim{count}' exactly {count} of {num_timesteps} steps; "
                     f"take a count near {num_timesteps}/k for a whole k, or '{count}' without 'ddim'")


def _count(text, whole):
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"respacing {whole!r} is not a number of steps ('250'), a list of them ('10,15,20') "
                         "or 'ddim' and a number ('ddim50')") from None


def respaced_betas(betas, kept):
    """Betas of the process that visits only the steps `kept`: the same alpha_bar there (Improved DDPM, eq. 19)."""
    alpha_bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[np.asarray(kept)]
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
