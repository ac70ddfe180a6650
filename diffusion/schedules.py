"""Noise schedules, and respacing: the steps of a schedule that a shorter process keeps."""
import math

import numpy as np


def named_betas(name, num_steps):
    """Compute the betas in (0, 1) of a named schedule, float64, shape (num_steps,).

    "linear" is 1e-4 .. 0.02 for 1000 steps (DDPM, section 4), scaled by 1000 / num_steps for other lengths;
    "squaredcos_cap_v2" has alpha_bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2), beta <= 0.999 (Improved DDPM, eq. 17).
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
    raise ValueError(f"unknown noise schedule {name!r}: use 'linear' or 'squaredcos_cap_v2'")


def space_timesteps(num_timesteps, section_counts):
    """Choose the steps that a shorter process keeps.

    Args:
        num_timesteps (int): T, length of the full process.
        section_counts (int | list[int] | str): A count, a list of counts or "10,15,20": as many equal sections, each
            of which keeps its count of evenly spaced steps, including its ends (Improved DDPM, section 4).
            "ddimN": N steps at one integer stride from 0 (DDIM, appendix D.3).

    Returns:
        list[int]: Sorted steps in [0, T).

    Raises:
        ValueError: If a section has fewer steps than its count, or if no stride gives N steps.
    """
    if isinstance(section_counts, int):
        section_counts = [section_counts]
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _strided_timesteps(num_timesteps, _parse_count(section_counts[len("ddim"):], section_counts))
        section_counts = [_parse_count(count, section_counts) for count in section_counts.split(",")]
    size, num_longer = divmod(num_timesteps, len(section_counts))
    kept, start = [], 0
    for i, count in enumerate(section_counts):
        length = size + (i < num_longer)
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} steps of a section of {length} (respacing {section_counts} "
                             f"of {num_timesteps} steps)")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # The position is a sum, as in the published code: half-way between two steps, the rounding error of the sum
        # decides which step is kept.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _strided_timesteps(num_timesteps, count):
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"'ddim{count}' is not possible: between 1 and {num_timesteps} steps can be kept")
    kept = {len(steps): steps for stride in range(num_timesteps, 0, -1) if (steps := range(0, num_timesteps, stride))}
    if count not in kept:
        below, above = max(n for n in kept if n < count), min(n for n in kept if n > count)
        raise ValueError(f"no integer stride gives 'ddim{count}' exactly {count} of {num_timesteps} steps; the nearest "
                         f"that one gives are 'ddim{below}' and 'ddim{above}'")
    return list(kept[count])


def _parse_count(text, respacing):
    try:
        return int(text)
    except ValueError:
        if respacing.startswith("ddim"):
            raise ValueError(f"{respacing!r} lacks its number of steps, as in 'ddim50'") from None
        raise ValueError(f"respacing {respacing!r} is not a number of steps ('250'), a list of them ('10,15,20') "
                         "or 'ddim' and a number ('ddim50')") from None


def respaced_betas(betas, kept):
    """Compute betas that give the steps `kept` the alpha_bar of the full process (Improved DDPM, eq. 19)."""
    alpha_bar = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[np.asarray(kept)]
    return 1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1])
