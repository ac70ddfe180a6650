"""Bits per dimension of a trained DiT by the variational bound (DDPM, eq. 5; Improved DDPM, section 3)."""
import math

import torch
from tqdm.auto import tqdm

from common import distributed
from common.errors import ArgumentError, UserError
from common.seeding import LIKELIHOOD
from data.corrupt_images import CorruptImage, raise_if_unreadable
from data.dataset import evenly_spaced_indices
from diffusion import create_diffusion
from evaluation.plots import new_figure, save_figure
from sampling.noise import PerSampleRNG


def bits_per_dimension(loaded, dataset, num_images=None, batch_size=32, seed=0, respacing=""):
    """Compute an upper bound on the bits per dimension of a data set, given its labels. Call it on all ranks.

    For a model of pixels it bounds the code length of 8-bit images; the predicted x_0 is clipped to their range. For a
    model of latents it measures how well the model fits one draw of each image's posterior, with the bins of 8-bit
    pixels at t = 0 as in the training loss. That is not a bound on images: it leaves out what the VAE loses, and is not
    comparable between VAEs. DiT is not trained for likelihood: L_simple gives little weight to the terms of small t,
    where most bits are, so that models trained for likelihood reach fewer bits.

    The images, by default all, are evenly spaced over the data set; the noise of image i is a function of (seed, i).
    Fewer timesteps (`respacing`, as `create_diffusion` takes it) give another bound, most often a looser one.

    Returns:
        dict: The same on every rank, plain values. All but the first two and the last two are means over the images.

        - space: "pixels" or "latents of VAE"; its dimensions, C H W; the number of images.
        - bits_per_dimension: The bound, prior + the sum of per_timestep.
        - standard_error: Of the bound, by the choice of images and the noise; None for a single image.
        - prior: KL(q(x_T | x_0) || N(0, I)), which does not depend on the model.
        - decoder_t0: -log p(x_0 | x_1), the first of per_timestep.
        - per_timestep: The term of the bound of each timestep, t = 0 first.
        - mse_per_timestep: Mean squared error of the predicted noise; for pixels after clipping the predicted x_0.
        - timesteps: The trained timesteps that these belong to: 0 .. 999, or those kept.
        - model_calls: Forward passes of an image.

    Raises:
        ArgumentError: For an invalid respacing, or a batch that does not fit into memory.
        UserError: For an unreadable image, data that does not fit the model, or a bound that is not finite.
    """
    try:
        diffusion = create_diffusion(respacing, learn_sigma=loaded.model.learn_sigma)
    except ValueError as error:
        raise ArgumentError(str(error), respacing=respacing) from None
    accumulator = VLBAccumulator(diffusion.num_timesteps)
    with distributed.raise_on_all_ranks():
        classes = match_classes(loaded, dataset)
        indices = range(len(dataset)) if num_images is None else evenly_spaced_indices(len(dataset), num_images)
        local = indices[distributed.rank()::distributed.world_size()]
        batches = [local[start:start + batch_size] for start in range(0, len(local), batch_size)]
        with tqdm(desc="bits per dimension", unit="pass", total=len(batches) * diffusion.num_timesteps,
                  dynamic_ncols=True, disable=not distributed.is_rank0() or None) as bar:
            for batch in batches:
                accumulator.add(compute_vlb_terms(loaded, diffusion, dataset, batch, classes, seed, bar.update))
    with distributed.collective_timeout("the bits per dimension"):
        accumulator.reduce()
    autoencoder = loaded.autoencoder
    return dict(space=f"latents of {autoencoder.name}" if autoencoder.is_random else "pixels",
                dimensions=math.prod(loaded.model.sample_shape), **accumulator.means(),
                timesteps=[int(t) for t in diffusion.timestep_map], model_calls=diffusion.num_timesteps)


def match_classes(loaded, dataset):
    """Return the model's label of each class of the data set; raise a `UserError` if the data does not fit the model.

    Classes are matched by name if the checkpoint has names: a folder that lacks a class has other numbers.
    """
    size, channels = loaded.image_size, loaded.autoencoder.image_channels
    if (dataset.image_size, dataset.channels) != (size, channels):
        raise UserError(f"the data has images of {dataset.image_size} pixels and {dataset.channels} channels, the "
                        f"model in {loaded.path} is for {size} pixels and {channels} channels")
    if not loaded.class_names:
        if len(dataset.class_names) > loaded.num_classes:
            raise UserError(f"the data has {len(dataset.class_names)} classes, the model in {loaded.path} has "
                            f"{loaded.num_classes}")
        return list(range(len(dataset.class_names)))
    label_of = {name: label for label, name in enumerate(loaded.class_names)}
    unknown = [name for name in dataset.class_names if name not in label_of]
    if unknown:
        raise UserError(f"the data has the class '{unknown[0]}', on which the model in {loaded.path} was not trained; "
                        f"its classes are '{loaded.class_names[0]}' and {len(label_of) - 1} others")
    return [label_of[name] for name in dataset.class_names]


def compute_vlb_terms(loaded, diffusion, dataset, indices, classes, seed, on_pass=lambda: None):
    """Return what `calc_bpd_loop` computes of the images with these indices, on the CPU in float64.

    `classes` is the result of `match_classes`; `on_pass` is called after each forward pass.

    Raises:
        ArgumentError: If the batch does not fit into memory.
        UserError: If an image cannot be read, or a bound is not finite.
    """
    model, autoencoder, device = loaded.model, loaded.autoencoder, loaded.model.device
    images = torch.stack(_read_images(dataset, indices)).to(device)
    cond = dict(y=torch.tensor([classes[dataset.labels[index]] for index in indices], device=device))
    noise = PerSampleRNG(seed, indices, device, stream=LIKELIHOOD)
    # By shape, not like x_start: a VAE's latents may be channels-last, which would order the noise differently.
    shape = (len(indices), *model.sample_shape)

    def denoiser(x, t):
        output = model(x, t, **cond)
        on_pass()
        return output

    try:
        x_start = autoencoder.encode(images, noise.initial(shape)) if autoencoder.is_random else images
        terms = diffusion.calc_bpd_loop(denoiser, x_start, clip_denoised=not autoencoder.is_random,
                                        noise_fn=lambda _: noise.initial(shape))
    except torch.OutOfMemoryError:
        raise ArgumentError(f"a batch does not fit into the memory of {device}. Lower it",
                            batch_size=len(indices)) from None
    terms = {name: values.cpu().double() for name, values in terms.items()}
    for index, total in zip(indices, terms["total_bpd"]):
        if not torch.isfinite(total):
            raise UserError(f"the bound of the image {dataset.paths[index]} is {total:g}: the model in {loaded.path} "
                            "does not predict finite noise and variance")
    return terms


def _read_images(dataset, indices):
    images = [dataset.read(index) for index in indices]
    for image in images:
        if isinstance(image, CorruptImage):
            raise_if_unreadable(image)
            raise UserError(f"cannot read the image {image.path} ({image.reason}). Repair or remove it: without it "
                            "this would be another data set")
    return images


class VLBAccumulator:
    """Sums of the bound and its terms over images.

    `values`, shape (4 + 2T,), float64: number of images, sums of their bounds, of the squared bounds, of the prior,
    then of the T terms and of the T mean squared errors, t = 0 first.
    """

    def __init__(self, num_timesteps):
        self.values = torch.zeros(4 + 2 * num_timesteps, dtype=torch.float64)

    def add(self, terms):
        """Add the terms of a batch, from `compute_vlb_terms`."""
        total = terms["prior_bpd"] + terms["vb"].sum(dim=1)  # again in float64: exactly the sum of its terms
        scalars = torch.stack([torch.ones_like(total), total, total.square(), terms["prior_bpd"]])
        self.values += torch.cat([scalars.sum(dim=1), terms["vb"].sum(dim=0).flip(0), terms["mse"].sum(dim=0).flip(0)])

    def reduce(self):
        """Combine the sums of all ranks, on every rank."""
        if distributed.world_size() > 1:
            self.values = distributed.all_reduce_sum(self.values.to(distributed.device())).cpu()

    def means(self):
        """Return the part of the result of `bits_per_dimension` that was measured."""
        count = round(self.values[0].item())
        bpd, square, prior = (self.values[1:4] / count).tolist()
        vb, mse = (self.values[4:] / count).view(2, -1).tolist()
        variance = max(0.0, square - bpd**2)
        return dict(images=count, bits_per_dimension=bpd, prior=prior, decoder_t0=vb[0], per_timestep=vb,
                    standard_error=(variance / (count - 1)) ** 0.5 if count > 1 else None, mse_per_timestep=mse)


def plot_nll(result, path):
    """Plot a result of `bits_per_dimension` as a PNG: terms of the bound and errors of the noise, by timestep."""
    t = result["timesteps"]
    figure, (left, right) = new_figure(2, width=4.5, height=3.6)
    figure.get_layout_engine().set(wspace=0.05)
    markers = dict(marker="o", markersize=3) if len(t) <= 100 else {}
    # Terms near 0 may be rounded below it; a logarithmic axis leaves them out.
    left.plot(t, [value if value > 0 else float("nan") for value in result["per_timestep"]], "k-", lw=1.2, **markers)
    left.plot(t[:1], [result["decoder_t0"]], "ks", ms=6, mfc="white", clip_on=False, zorder=3, ls="none",
              label=f"t = 0, decoder: {result['decoder_t0']:.3f}")
    left.axhline(result["prior"], color="0.45", ls="--", lw=1.2, label=f"prior: {result['prior']:.2g}")
    left.set(ylabel="bound's term (bits per dimension)")
    left.legend(loc="upper right", frameon=False)
    right.plot(t, result["mse_per_timestep"], "k-", lw=1.2, **markers)
    right.set(ylabel="mean squared error of the noise")
    for panel, letter in ((left, "a"), (right, "b")):
        panel.set(xlabel="timestep t", yscale="log")
        panel.set_title(letter, loc="left", weight="bold")
    figure.suptitle(summarize_nll(result), wrap=True, fontsize="medium")
    save_figure(figure, path, dpi=200)


def summarize_nll(result):
    """Return a result of `bits_per_dimension` as a line."""
    error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.3f}"
    return (f"{result['bits_per_dimension']:.3f}{error} bits per dimension of {result['space']} "
            f"(bound; {result['images']:,} images, {len(result['timesteps']):,} timesteps)")
