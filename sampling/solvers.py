"""Few-step samplers: DPM-Solver++ (2M), UniPC and Heun's method, by the schedulers of diffusers.

The networks are those of `diffusion/` as they are; of their outputs the noise counts, and the variance is dropped.
"""
import copy

from tqdm import tqdm

from common.errors import ArgumentError, UserError

# Class of diffusers and its arguments. Order 2, which guidance needs (DPM-Solver++, section 6); the last step ends at
# sigma 0.
SOLVERS = {
    "dpm++": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++", solver_order=2)),
    "unipc": ("UniPCMultistepScheduler", dict(solver_order=2)),
    "heun": ("HeunDiscreteScheduler", {}),
}
PREFIXES = {"dpm": "dpm++", "unipc": "unipc", "heun": "heun"}  # of --num-sampling-steps, as in dpm20
SPACINGS = ("trailing", "leading", "linspace")  # the first is the default
_SCHEDULE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


class SolverProcess:
    """The timesteps of a solver; takes the place of a `GaussianDiffusion` in a `SamplingPipeline`.

    Args:
        solver (str): A key of SOLVERS.
        num_steps (int): Steps; Heun's method calls the model twice in each but the last.
        timestep_spacing (str): One of SPACINGS: "trailing" and "linspace" begin at t = 999, "leading" below it and
            ends nearer to 0.

    Attributes:
        num_timesteps (int): Steps.
        timestep_map (list): Timesteps of the model's calls, of 0 .. 999, the last call first.

    Raises:
        ArgumentError: If there are no such steps.
        UserError: If diffusers is not installed.
    """

    def __init__(self, solver, num_steps, timestep_spacing=None):
        if not 1 <= num_steps <= _SCHEDULE["num_train_timesteps"]:
            raise ArgumentError("a solver takes 1 to 1000 steps; 10 to 30 are usual.",
                                num_sampling_steps=num_steps)
        if num_steps == 1 and timestep_spacing == "leading":
            raise ArgumentError("a single step would begin at t = 0, which returns the noise. Choose trailing.",
                                timestep_spacing=timestep_spacing)
        try:
            import diffusers
        except ImportError:
            raise UserError(f"the sampler {solver} needs diffusers: pip install diffusers") from None
        name, options = SOLVERS[solver]
        self.timestep_spacing, self.num_timesteps = timestep_spacing or SPACINGS[0], num_steps
        self.scheduler = getattr(diffusers, name)(**_SCHEDULE, **options, timestep_spacing=self.timestep_spacing)
        self.scheduler.set_timesteps(num_steps)
        self.timestep_map = self.scheduler.timesteps.tolist()[::-1]

    def steps(self, denoise, x, progress=False):
        """Sample from noise x of shape (N, C, H, W), yielding dict(sample) after every step.

        `denoise(x, t)` returns the noise in its first C channels; before each call its attribute `timestep` is set.
        """
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_begin_index(0)  # or it would look for the first timestep on the device
        on_device, channels = scheduler.timesteps.to(x.device), x.shape[1]
        x = x * scheduler.init_noise_sigma
        for i, timestep in enumerate(tqdm(self.timestep_map[::-1], disable=not progress)):
            denoise.timestep = timestep
            scaled = scheduler.scale_model_input(x, scheduler.timesteps[i])
            eps = denoise(scaled, on_device[i].expand(len(x)))[:, :channels]
            x = scheduler.step(eps, scheduler.timesteps[i], x, return_dict=False)[0]
            is_last = i + 1 == len(self.timestep_map)
            if is_last or getattr(scheduler, "state_in_first_order", True):  # Heun: the second call ends a step
                yield dict(sample=x * self._variance_preserving_scale(scheduler))

    def _variance_preserving_scale(self, scheduler):
        """Return the factor to the scale of the other samplers: Heun's noise grows, x_0 + sigma eps."""
        is_growing = self.scheduler.init_noise_sigma != 1
        return (1 + float(scheduler.sigmas[scheduler.step_index]) ** 2) ** -0.5 if is_growing else 1.0


def parse_steps(num_sampling_steps):
    """Split "dpm20" into the solver's name and the number of steps; (None, the argument) if it names no solver."""
    text = str(num_sampling_steps)
    for prefix, solver in PREFIXES.items():
        if text.startswith(prefix) and text[len(prefix):].isdecimal():
            return solver, int(text[len(prefix):])
    return None, num_sampling_steps
