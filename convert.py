"""Convert a DiT between this code and diffusers, and between .pt and .safetensors.

    python convert.py results/000-DiT-XL-2/checkpoints/0400000.pt --to diffusers --output DiT-mine
    python convert.py DiT-mine --to dit --output mine.pt               # or mine.safetensors; also a folder of the hub
    python convert.py mine.pt --to dit --output mine.safetensors

Every weight is accounted for, and nothing is overwritten without --overwrite.
"""
import common.startup  # noqa: F401

import argparse
import contextlib
import json
import os
import shutil
import tempfile

from autoencoder.vae import VAE
from common.checkpoint_io import save_checkpoint, write_safetensors
from common.cli import HelpFormatter, parse_args, path_or_name
from common.errors import ArgumentError, run_command
from common.files import atomic_write, check_writable
from common.state_dicts import select_weights
from models import default_cfg_channels
from networks import model_config
from sampling import diffusers_format
from sampling.checkpoint_metadata import STEP_NAMES, as_dict
from sampling.load_model import load_model, read_checkpoint

# What a folder may hold that --overwrite replaces.
EXPORTED = {"README.md", "dit.json", "model_index.json", "pipeline.py", "scheduler", "transformer", "vae"}
README = """A DiT (https://arxiv.org/abs/2212.09748), exported by convert.py.

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    images = pipeline([0, 1], guidance_scale=4.0, num_inference_steps=50).images

Load it with `custom_pipeline`, which takes `pipeline.py` of this folder (read it first: it is code). The plain
`DiTPipeline` of diffusers computes something else: it shifts the frequencies of the timestep embedding, guides all
channels, and takes class 1000 for the null class.
"""


def build_parser():
    """Build the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, or a folder of diffusers")
    parser.add_argument("--to", choices=["diffusers", "dit"], required=True, help="layout of the output")
    parser.add_argument("--output", required=True, help="a folder (diffusers), or a .pt or .safetensors file (dit)")
    parser.add_argument("--weights", choices=["ema", "model"], help="average or raw weights (default: the average)")
    parser.add_argument("--vae", type=path_or_name, default="ema",
                        help="VAE to export with the model: ema, mse, a directory, a hub name or none (pixels)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def main():
    """Convert a checkpoint."""
    flags, explicit_args = parse_args(build_parser())
    if os.path.lexists(flags.output) and not flags.overwrite:
        raise ArgumentError("it exists. Name another one, or add --overwrite", output=flags.output)
    if os.path.isdir(flags.output) and not (flags.to == "diffusers" and set(os.listdir(flags.output)) <= EXPORTED):
        raise ArgumentError("this folder holds something else than an export, and is not replaced. Name another one",
                            output=flags.output)
    if flags.to == "dit" and not flags.output.lower().endswith((".pt", ".safetensors")):
        raise ArgumentError("its name must end in .pt or .safetensors", output=flags.output)
    check_writable(flags.output, is_folder=flags.to == "diffusers", output=flags.output)
    (write_diffusers if flags.to == "diffusers" else write_dit)(flags, explicit_args)
    print(f"wrote {flags.output}")


def write_dit(flags, explicit_args):
    """Write a checkpoint of this code: weights, and what the source holds about them."""
    if "vae" in explicit_args:
        raise ArgumentError("a checkpoint holds no VAE. Leave it out", vae=flags.vae)
    checkpoint = read_checkpoint(flags.source)
    weights, kind = select_weights(checkpoint, flags.source, flags.weights, print)
    print(f"{flags.source}: {kind} weights, {len(weights)} tensors")
    metadata = {name: _plain(as_dict(checkpoint.get(name))) for name in ("args", "config")}
    metadata |= {name: checkpoint[name] for name in STEP_NAMES if isinstance(checkpoint.get(name), int)}
    metadata = {name: value for name, value in metadata.items() if value != {}}
    if flags.output.lower().endswith(".safetensors"):
        write_safetensors(flags.output, weights, metadata)
    else:
        save_checkpoint(flags.output, dict(model=weights) | metadata)


def _plain(values):
    """Return the entries that JSON can hold."""
    plain = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):
            plain[name] = json.loads(json.dumps(value))
    return plain


def write_diffusers(flags, explicit_args):
    """Write a folder of diffusers; it appears under its name when it is complete."""
    try:
        from diffusers import DDIMScheduler, DiTTransformer2DModel
    except ImportError:
        raise ArgumentError("diffusers is not installed: pip install diffusers", to="diffusers") from None
    from sampling import diffusers_pipeline

    loaded = load_model(flags.source, "DiT-XL/2", 256, 1000, flags.vae, explicit_args & {"vae"}, "cpu",
                        weights=flags.weights)
    config = diffusers_format.transformer_config(model_config(loaded.model))
    transformer = DiTTransformer2DModel(**config)
    transformer.load_state_dict(diffusers_format.to_diffusers(loaded.model.state_dict()), strict=True)
    names = loaded.class_names or []
    scaling = loaded.autoencoder.latent_scaling if isinstance(loaded.autoencoder, VAE) else None
    pipeline = diffusers_pipeline.ExportedDiTPipeline(
        transformer, loaded.autoencoder.vae if scaling else None,
        DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        id2label={str(number): name for number, name in enumerate(names)} or None,
        guided_channels=default_cfg_channels(loaded.model.in_channels),
        latent_scale=scaling.scale if scaling else 1.0, latent_shift=scaling.shift if scaling else 0.0)
    parent = os.path.dirname(os.path.abspath(flags.output))
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = os.path.join(temporary, "export")
        pipeline.save_pretrained(folder)
        shutil.copy(diffusers_pipeline.__file__, os.path.join(folder, "pipeline.py"))
        with atomic_write(os.path.join(folder, "README.md")) as file:
            file.write(README.encode())
        diffusers_format.write_metadata(folder, dict(
            args=dict(model=loaded.name, image_size=loaded.image_size, vae=loaded.autoencoder.name,
                      num_classes=loaded.model.config.num_classes),
            config=dict(model=model_config(loaded.model), class_names=loaded.class_names,
                        image_channels=scaling.image_channels if scaling else loaded.model.in_channels)))
        if os.path.isdir(flags.output):
            shutil.rmtree(flags.output)
        os.rename(folder, flags.output)


if __name__ == "__main__":
    run_command(main)
