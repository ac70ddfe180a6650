"""Recognize weights that are not those of a DiT for diffusion, by signs of a file that are known."""
import os
import re
import unicodedata

import torch

from common.errors import UserError
from common.state_dicts import ANCHOR, list_tensor_names
from sampling.checkpoint_metadata import as_dict, as_integer, as_number

FLOW = "flow matching, which predicts a velocity"
# Names of other models, as a word of a file's name or as the architecture in its flags.
NAMES = re.compile(r"(?<![a-z])(?:"
                   r"(?P<flow>sit|repa(?:[-_]?e)?|lightning[-_]?dit|rae|flow(?:[-_ ]?matching)?|rectified[-_ ]?flow)|"
                   r"pixart(?:[-_ ]?(?:alpha|sigma))?|u[-_]?vit|mdt(?:v2)?|mask[-_]?dit|u[-_]?dit|latte|sd3|flux|edm2?"
                   r")(?![a-z])")
# Names of weights, and whose they are. The first match counts.
WEIGHTS = [
    (r"lora_(A|B|down|up)\b", "an adapter (LoRA), without the model that it belongs to"),
    (r"(^|\.)projectors\.\d", f"REPA or SiT: {FLOW}"),
    (r"mlp\.w(12|1|2|3)\.|feat_rope\.|attn\.(q|k)_norm\.", "LightningDiT or another DiT with other blocks (SwiGLU, "
                                                         "rotary positions, normalized queries)"),
    (r"transformer_blocks\.\d+\.norm1\.emb\.", "a DiT in the layout of diffusers. Name the folder of this file, "
                                               "with its config.json, instead of the file"),
    (r"(^|\.)(t_block\.1|y_embedder\.y_proj|adaln_single|caption_projection|context_embedder)\.",
     "a text-to-image model (PixArt, Stable Diffusion 3 or the like)"),
    (r"(^|\.)(joint_blocks|double_blocks|single_transformer_blocks|transformer_blocks)\.\d",
     "another transformer of diffusers or of a text-to-image model"),
    (r"(^|\.)(mask_token|decoder_blocks|sideblocks|en_inblocks)", "MDT or MaskDiT"),
    (r"(^|\.)(in_blocks|out_blocks)\.\d", "U-ViT"),
    (r"(^|\.)(encoder|decoder)\.(conv_in|down|up|mid)", "an autoencoder. It belongs to --vae"),
    (r"(^|\.)(input_blocks|down_blocks|enc)\.\d", "a U-Net"),
    (r"(^|\.)(cls_token|Mixed_5b|layer1\.0)", "a network that classifies images"),
]
# Entries of stored flags: those that only flow matching has, and those whose values tell what is predicted.
FLOW_FLAGS = {"path_type", "transport", "flow", "flow_matching", "flow_type", "rectified_flow", "use_flow",
              "interpolant", "velocity", "predict_velocity", "predict_v"}
X_FLAGS = {"predict_xstart", "predict_x0", "predict_x_start"}
PREDICTION_FLAGS = {"prediction", "prediction_type", "pred_type", "predict", "objective", "parameterization",
                    "parametrization", "model_mean_type", "mean_type", "target_type", "loss_type", "loss",
                    "prediction_target"}
PREDICTIONS = [(r"veloc|flow|rectif|interpol", FLOW),
               (r"^v$|^predv$|^vpred|v$", "v, of flow matching or of a diffusion that predicts it"),
               (r"score", "a score"),
               (r"xstart|startx|^x0|predx|^sample$|^clean", "clean images (x_0)"), (r"edm|karras", "EDM's target")]
ZERO_SNR_FLAGS = {"zero_terminal_snr", "rescale_betas_zero_snr", "zero_snr"}
SCHEDULE_FLAGS = {"noise_schedule", "beta_schedule", "schedule_name"}
LENGTH_FLAGS = {"diffusion_steps", "num_train_timesteps", "num_diffusion_steps", "train_timesteps"}


def refuse_other_models(checkpoint, state_dict, path, is_ours, log):
    """Raise a `UserError` that names the model if a file is not known to be one that can be sampled as a DiT.

    Args:
        checkpoint (dict): The file.
        state_dict (dict[str, Tensor]): Its weights; empty if none were found.
        path (str): Its path.
        is_ours (bool): Whether train.py wrote it: then its name says nothing.
        log (callable): Called with a warning if the weights look like those of SiT.
    """
    names = state_dict if ANCHOR in state_dict else list_tensor_names(checkpoint)
    for pattern, model in WEIGHTS:
        if match := next(filter(re.compile(pattern).search, names), None):
            raise UserError(f"{path} holds weights of {model}. (It has {match})")
    for reason in _flag_signs(checkpoint):
        raise UserError(f"{path} was trained for another process than the diffusion that is sampled here: {reason}. "
                        "Sampled as a DiT it would give noise")
    if not is_ours and (match := NAMES.search(unicodedata.normalize("NFKC", os.path.basename(path)).lower())):
        kind = FLOW if match["flow"] else "another architecture or process"
        raise UserError(f"{path}: by its name this is {match[0]!r}: {kind}. Such weights can have the names and shapes "
                        "of a DiT and give noise. If it is a DiT all the same, rename the file")
    if _is_variance_untrained(state_dict):
        log(f"WARNING: {path}: the outputs for the variance are all zero, never trained, as in SiT ({FLOW}), whose "
            "weights have the names of a DiT. If these are such weights, the images will be noise")


def _flag_signs(checkpoint):
    """Yield a reason for each stored flag that belongs to another model or process."""
    for name, value in _stored_flags(checkpoint):
        text = re.sub(r"[^a-z0-9]", "", value.lower()) if isinstance(value, str) else ""
        shown = f"its flags have {name}={value if isinstance(value, (str, int, float, bool)) else '...'}"
        is_set = as_number(value) != 0 if not isinstance(value, str) else text not in ("", "none", "false", "0")
        is_set = is_set and value is not None
        if name in ("model", "model_type", "arch", "net") and isinstance(value, str) and NAMES.search(value.lower()):
            yield f"{shown}, another model"
        elif name in FLOW_FLAGS and (is_set or isinstance(value, dict)):
            yield f"{shown} ({FLOW})"
        elif name in X_FLAGS and is_set:
            yield f"{shown}, clean images instead of the noise"
        elif name in ZERO_SNR_FLAGS and is_set:
            yield f"{shown}, another noise schedule"
        elif name in PREDICTION_FLAGS:
            yield from (f"{shown} ({kind})" for pattern, kind in PREDICTIONS if re.search(pattern, text))
        elif name in SCHEDULE_FLAGS and text not in ("", "linear"):
            yield f"{shown}, not linear"
        elif name in LENGTH_FLAGS and as_integer(value) not in (None, 1000):
            yield f"{shown}, not 1000"


def _stored_flags(checkpoint, depth=0):
    """Yield (name, value) of the plain values in nested dictionaries; a text with lines such as `a: b` is read too."""
    for name, value in checkpoint.items():
        if not isinstance(name, str) or torch.is_tensor(value):
            continue
        name = name.lower().replace("-", "_").lstrip("_")
        inner = as_dict(value)
        if any(map(torch.is_tensor, inner.values())):
            continue  # weights
        yield name, value
        if inner and depth < 4:
            yield from _stored_flags(inner, depth + 1)
        elif isinstance(value, str) and "\n" in value:
            yield from ((key.strip().lower(), text.strip(" '\"")) for key, text in
                        re.findall(r"^([\w\s-]+):[ \t]*(\S.*)$", value, flags=re.MULTILINE))


def _is_variance_untrained(state_dict):
    """Whether the second half of the output channels is zero, as it is at the start, but the first is not."""
    output, patches = state_dict.get("final_layer.linear.weight"), state_dict.get(ANCHOR)
    if output is None or patches is None or len(output) != 2 * patches[0].numel():
        return False
    halves = output.view(-1, 2, patches.shape[1], output.shape[1]).unbind(1)  # (p * p, channels, D) each
    return not halves[1].any() and bool(halves[0].any())
