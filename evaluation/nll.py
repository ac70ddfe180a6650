"""Bits per dimension of a trained DiT by the variational bound (DDPM, eq. 5; Improved DDPM, section 3)."""

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from common import distributed
from common.errors import UserError
from common.files import atomic_write
from common.seeding import LIKELIHOOD
from data.corrupt_images import CorruptImage, raise_if_unreadable
from data.dataset import evenly_spaced_indices
from diffusion import create_diffusion
from sampling.noise import PerSampleRNG


def bits_per_dimension(trained, dataset, num_samples=None, batch_size=32, seed=0, respacing=""):
    """An upper bound on how many bits a number a trained model needs for a data set, given the labels.

    accelerator  from `runtime.processes.start`; the processes share the images, and all of them get the result
    trained      a `LoadedModel`
    dataset      an `LabeledImageDataset`
    num_samples  so many images, spread evenly over the data set; None: all
    batch_size   images at once, a process
    seed         of the noise; that of image i is a function of (seed, i)
    respacing    as `create_diffusion` takes it. "": all trained timesteps. With fewer it is another bound, most often
                 a looser one
    return       dictionary of plain values, ready for JSON:
                 space               "pixels" or "latents of VAE"
                 dimensions          numbers an image, C H W of what the model works on
                 images              how many were looked at
                 bits_per_dimension  the bound: prior + the sum of per_timestep. Mean of the images, like what follows
                 standard_error      of it, by the choice of images and by the noise; None for a single image
                 prior               KL(q(x_T | x_0) || N(0, I)), which no model can change; bits per dimension
                 decoder_t0          -log p(x_0 | x_1), the first of per_timestep; bits per dimension
                 per_timestep        the bound's term (vb) at each timestep, t = 0 first; bits per dimension
                 mse_per_timestep    mean squared error of the predicted noise; in pixel space after the predicted x_0
                                     is confined to [-1, 1]
                 timesteps           to which of the trained timesteps these belong: 0 .. 999, or those kept
                 model_calls         forward passes an image
    raise        UserError for an image that cannot be read, for data that does not fit the model, for a bound that is
                 not finite

    What the number means depends on the space. Of pixels it bounds the code length of 8-bit images (the predicted x_0
    is confined to their range); that the digits have but 17 grey values is of no help to it. Of latents it says how
    well the model fits one draw of each image's posterior, with the bins of 8-bit pixels at t = 0, though latents have
    none (trap 6 of the contract; the training loss has them too): it is no bound on images, leaves out what the VAE
    loses, and cannot be compared between VAEs. In neither space was DiT trained for likelihood: L_simple gives the
    terms of small t, where most bits are, little weight; models that are trained for likelihood reach fewer bits.
    """
    try:
        diffusion = create_diffusion(respacing, learn_sigma=trained.model.learn_sigma)
    except ValueError as error:
        raise UserError(f"the timesteps '{respacing}': {error}") from None
    sums = VLBAccumulator(diffusion.num_timesteps)
    with distributed.raise_on_all_ranks():
        classes = match_class_rows(trained, dataset)
        chosen = range(len(dataset)) if num_samples is None else evenly_spaced_indices(len(dataset), num_samples)
        own = chosen[distributed.rank()::distributed.world_size()]
        batches = [own[first:first + batch_size] for first in range(0, len(own), batch_size)]
        with tqdm(desc="bits per dimension", unit="pass", total=len(batches) * diffusion.num_timesteps,
                  dynamic_ncols=True, disable=not distributed.is_rank0() or None) as bar:
            for indices in batches:
                sums.add(compute_vlb_terms(trained, diffusion, dataset, indices, classes, seed, distributed.device(), bar.update))
    if distributed.world_size() > 1:
        sums.values = sums.values.to(distributed.device())
        with distributed.collective_timeout("the bits per dimension"):
            dist.all_reduce(sums.values)
    autoencoder, model = trained.autoencoder, trained.model
    height, width = model.x_embedder.input_size
    return dict(space=f"latents of {autoencoder.name}" if autoencoder.is_random else "pixels",
                dimensions=model.in_channels * height * width, **sums.means(),
                timesteps=[int(t) for t in diffusion.timestep_map], model_calls=diffusion.num_timesteps)


def match_class_rows(trained, dataset):
    """The row of the model's class table for each class of the data set; a `UserError` where they do not fit.

    Classes go by name where the checkpoint knows names: a held-out folder that lacks one would shift all numbers.
    """
    rows, size, channels = trained.model.y_embedder.num_classes, trained.image_size, _image_channels(trained.autoencoder)
    if (dataset.image_size, dataset.channels) != (size, channels):
        raise UserError(f"the data has images of {dataset.image_size} pixels and {dataset.channels} channels, the "
                        f"model in {trained.path} is for {size} pixels and {channels} channels")
    if not trained.class_names:
        if len(dataset.class_names) > rows:
            raise UserError(f"the data has {len(dataset.class_names)} classes, the model in {trained.path} has {rows}")
        return list(range(len(dataset.class_names)))
    row_of = {name: row for row, name in enumerate(trained.class_names)}
    unknown = [name for name in dataset.class_names if name not in row_of]
    if unknown:
        raise UserError(f"the data has the class '{unknown[0]}', on which the model in {trained.path} was not trained; "
                        f"it knows '{trained.class_names[0]}' and {len(row_of) - 1} others")
    return [row_of[name] for name in dataset.class_names]


def _image_channels(autoencoder):
    return autoencoder.image_channels


def compute_vlb_terms(trained, diffusion, dataset, indices, classes, seed, device, on_pass):
    """What `calc_bpd_loop` says of the images `indices`, on the CPU in float64.

    classes  from `match_class_rows`
    on_pass  called after each forward pass
    """
    read = [dataset.read(index) for index in indices]
    for image in read:
        if isinstance(image, CorruptImage):
            raise_if_unreadable(image)
            raise UserError(f"cannot read the image {image.path} ({image.reason}). Repair it or take it out: without "
                            "it, this would be a number of another data set")
    noise = PerSampleRNG(seed, indices, device, stream=LIKELIHOOD)
    images = torch.stack(read).to(device)
    labels = torch.tensor([classes[dataset.labels[index]] for index in indices], device=device)

    def model(x, t):
        out = trained.model(x, t, labels)
        on_pass()
        return out

    try:
        shape = (len(indices), trained.model.in_channels, *trained.model.x_embedder.input_size)
        x_start = trained.autoencoder.encode(images, noise.initial(shape)) if trained.autoencoder.is_random else images
        # Latents are not confined to [-1, 1], pixels are. Noise goes by the shape: a VAE's latents may lie in memory
        # channels last, and noise like them would be filled in another order.
        terms = diffusion.calc_bpd_loop(model, x_start, clip_denoised=not trained.autoencoder.is_random,
                                        noise_fn=lambda _: noise.initial(shape))
    except torch.OutOfMemoryError:
        raise UserError(f"a batch of {len(indices)} images does not fit into the memory of {device}: lower "
                        "--per-proc-batch-size") from None
    terms = {name: values.cpu().double() for name, values in terms.items()}
    for index, total in zip(indices, terms["total_bpd"]):
        if not torch.isfinite(total):
            raise UserError(f"the bound of the image {dataset.paths[index]} is {total:g}: the model in {trained.path} "
                            "does not predict finite noise and variance")
    return terms


class VLBAccumulator:
    """Sums of the bound and its terms, of as many images as there may be.

    values  (4 + 2T,) float64: images, the sums of their bounds, of these squared, of the prior; of the T terms and of
            the T mean squared errors, t = 0 first. Those of several processes are added.
    """

    def __init__(self, num_timesteps):
        self.values = torch.zeros(4 + 2 * num_timesteps, dtype=torch.float64)

    def add(self, terms):
        """Add the images of a batch, from `bound`."""
        total = terms["prior_bpd"] + terms["vb"].sum(dim=1)  # anew in float64, so that it is the sum of its terms
        first = torch.stack([torch.ones_like(total), total, total.square(), terms["prior_bpd"]])
        self.values += torch.cat([first.sum(dim=1), terms["vb"].sum(dim=0).flip(0), terms["mse"].sum(dim=0).flip(0)])

    def means(self):
        """The part of the result of `bits_per_dimension` that was measured."""
        values = self.values.cpu()
        count = round(values[0].item())
        (bpd, square, prior), (vb, mse) = (values[1:4] / count).tolist(), (values[4:] / count).view(2, -1).tolist()
        variance = max(0.0, square - bpd**2)
        return dict(images=count, bits_per_dimension=bpd, prior=prior, decoder_t0=vb[0], per_timestep=vb,
                    standard_error=(variance / (count - 1)) ** 0.5 if count > 1 else None, mse_per_timestep=mse)


def plot_nll(result, path):
    """Draw a result of `bits_per_dimension` as a PNG: the bound's terms, and the error of the noise, by timestep.

    raise  UserError where it cannot be written
    """
    from matplotlib.figure import Figure
    t = result["timesteps"]
    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    left, right = figure.subplots(1, 2)
    few = dict(marker="o", markersize=3) if len(t) <= 100 else {}
    # Terms that are nearly 0 may come out below it by rounding: on a logarithmic axis they are left out.
    left.plot(t, [value if value > 0 else float("nan") for value in result["per_timestep"]], "k-", lw=1.2, **few)
    left.plot(t[:1], [result["decoder_t0"]], "ks", ms=6, mfc="white", clip_on=False, zorder=3, ls="none",
              label=f"t = 0, decoder: {result['decoder_t0']:.3f}")
    left.axhline(result["prior"], color="0.45", ls="--", lw=1.2, label=f"prior: {result['prior']:.2g}")
    left.set(ylabel="bound's term (bits per dimension)")
    left.legend(loc="upper right", frameon=False)
    right.plot(t, result["mse_per_timestep"], "k-", lw=1.2, **few)
    right.set(ylabel="mean squared error of the noise")
    for panel, letter in ((left, "a"), (right, "b")):
        panel.set(xlabel="timestep t", yscale="log")
        panel.set_title(letter, loc="left", weight="bold")
        panel.grid(color="0.9", lw=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(summarize_nll(result), wrap=True, fontsize="medium")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def summarize_nll(result):
    """A result of `bits_per_dimension` in a line."""
    error = "" if result["standard_error"] is None else f" ± {result['standard_error']:.3f}"
    return (f"{result['bits_per_dimension']:.3f}{error} bits per dimension of {result['space']} "
            f"(bound; {result['images']:,} images, {len(result['timesteps']):,} timesteps)")
