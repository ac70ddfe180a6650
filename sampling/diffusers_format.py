"""DiT as diffusers stores it: `DiTTransformer2DModel`, with copies of the embedders in every block."""
import json
import os

import torch

from common.checkpoint_io import load_checkpoint
from common.errors import UserError
from common.files import atomic_write
from common.state_dicts import shorten
from models import get_2d_sincos_pos_embed

# Names of layers here and there; `.weight` and `.bias` follow. N is the number of a block.
_OUTSIDE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1",
            "final_layer.linear": "proj_out_2"}
_IN_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
             "mlp.fc2": "ff.net.2"}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# Layers of the embedders, of which diffusers has a copy in every block.
_COPIES = {"t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
           "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
           "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
           "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
           "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight"}
_CLASS_NAMES = ("DiTTransformer2DModel", "Transformer2DModel")
OUR_METADATA = "dit.json"  # in an exported folder: what diffusers has no place for


def to_diffusers(state_dict):
    """Rename the weights of a DiT for `DiTTransformer2DModel`.

    The table of positions has no counterpart: it is computed there.
    """
    result, depth = {}, _count_blocks(state_dict, "blocks.")
    for kind in ("weight", "bias"):
        result |= {f"{theirs}.{kind}": state_dict[f"{ours}.{kind}"] for ours, theirs in _OUTSIDE.items()}
        for i in range(depth):
            there = f"transformer_blocks.{i}"
            result |= {f"{there}.{theirs}.{kind}": state_dict[f"blocks.{i}.{ours}.{kind}"]
                       for ours, theirs in _IN_BLOCK.items()}
            thirds = state_dict[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            result |= {f"{there}.{name}.{kind}": part.contiguous() for name, part in zip(_QKV, thirds)}
    for i in range(depth):
        result |= {f"transformer_blocks.{i}.norm1.emb.{theirs}": state_dict[ours] for ours, theirs in _COPIES.items()}
    return result


def from_diffusers(state_dict, path):
    """Rename the weights of a `DiTTransformer2DModel` for a DiT; the table of positions is left out.

    Raises:
        UserError: If weights are missing or have no counterpart, or the copies of the embedders differ.
    """
    rest, result, depth = dict(state_dict), {}, _count_blocks(state_dict, "transformer_blocks.")
    rest.pop("pos_embed.pos_embed", None)  # a fixed table
    try:
        for kind in ("weight", "bias"):
            result |= {f"{ours}.{kind}": rest.pop(f"{theirs}.{kind}") for ours, theirs in _OUTSIDE.items()}
            for i in range(depth):
                there = f"transformer_blocks.{i}"
                result |= {f"blocks.{i}.{ours}.{kind}": rest.pop(f"{there}.{theirs}.{kind}")
                           for ours, theirs in _IN_BLOCK.items()}
                result[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([rest.pop(f"{there}.{name}.{kind}") for name in _QKV])
        for ours, theirs in _COPIES.items():
            copies = [rest.pop(f"transformer_blocks.{i}.norm1.emb.{theirs}") for i in range(depth)]
            result[ours] = _only_copy(copies, theirs, path)
    except (KeyError, IndexError) as error:
        raise UserError(f"{path} holds no DiT of diffusers: there is no weight {error.args[0]}") from None
    if rest:
        raise UserError(f"{path} holds weights that a DiT has no place for: {shorten(rest)}")
    return result


def _only_copy(copies, name, path):
    """Return the first of equal copies."""
    for i, copy in enumerate(copies[1:], start=1):
        if not torch.equal(copy, copies[0]):
            difference = (copy.float() - copies[0].float()).abs().max().item()
            raise UserError(f"{path} was trained in diffusers: {name} differs from block to block (block {i} by "
                            f"{difference:.2g} from block 0), and a DiT has it once. Such a model cannot be converted")
    return copies[0]


def _count_blocks(state_dict, prefix):
    return len({name[len(prefix):].split(".")[0] for name in state_dict if name.startswith(prefix)})


def transformer_config(config):
    """Return the arguments of `DiTTransformer2DModel` for those of `build_dit`.

    Raises:
        UserError: If diffusers has no such network.
    """
    width, heads, side = config["hidden_size"], config["num_heads"], config["input_size"]
    problems = {
        f"{config['conditioning']} blocks": config["conditioning"] != "adaln-zero",
        "rectangular latents": not isinstance(side, int),
        f"an MLP ratio of {config['mlp_ratio']:g}": config["mlp_ratio"] != 4,
        "no null class": not config["class_dropout_prob"]}
    if unknown := [problem for problem, is_there in problems.items() if is_there]:
        raise UserError(f"diffusers has no DiT with {' and '.join(unknown)}: this model cannot be converted")
    channels = config["in_channels"]
    return dict(num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
                out_channels=channels * (2 if config["learn_sigma"] else 1), num_layers=config["depth"],
                sample_size=side, patch_size=config["patch_size"], num_embeds_ada_norm=config["num_classes"],
                attention_bias=True, norm_eps=1e-6)


def find_transformer(path):
    """Return the folder of the network if `path` is a folder of diffusers' DiT, or that network's folder, else None."""
    for folder in (path, os.path.join(path, "transformer")):
        if _read_json(os.path.join(folder, "config.json")).get("_class_name") in _CLASS_NAMES:
            return folder
    return None


def read_diffusers_folder(path):
    """Read a folder of diffusers as a checkpoint: dict(model, args, config), as `load_checkpoint` returns one.

    Args:
        path (str): A folder for which `find_transformer` returns one.

    Raises:
        UserError: If its weights are missing, or are not those of a DiT.
    """
    transformer = find_transformer(path)
    stored = _read_json(os.path.join(transformer, "config.json"))
    names = ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
             "diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model.bin")
    files = [os.path.join(transformer, name) for name in names if os.path.exists(os.path.join(transformer, name))]
    if not files:
        raise UserError(f"{transformer} holds no weights: there is no {names[1]}")
    weights, side = from_diffusers(load_checkpoint(files[0]), files[0]), stored.get("sample_size")
    width, _, patch_size, _ = weights["x_embedder.proj.weight"].shape
    if isinstance(side, int) and side % patch_size == 0:
        positions = get_2d_sincos_pos_embed(width, (side // patch_size,) * 2)
        weights["pos_embed"] = torch.from_numpy(positions)[None].float()
    parent = os.path.dirname(os.path.abspath(transformer))
    metadata = _read_json(os.path.join(parent, OUR_METADATA))
    metadata = metadata or _infer_metadata(stored, weights, _read_json(os.path.join(parent, "model_index.json")))
    if os.path.isdir(os.path.join(parent, "vae")):
        metadata["args"] = metadata.get("args", {}) | dict(vae=os.path.join(parent, "vae"))
    return metadata | dict(model=weights)


def _infer_metadata(stored, weights, index):
    """Return the entries args and config of a checkpoint, from the files of a folder that somebody else made."""
    classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    labels = index.get("id2label")
    labels = {str(number): name for number, name in labels.items()} if isinstance(labels, dict) else {}
    names = [labels.get(str(number)) for number in range(classes)]
    model = dict(input_size=stored.get("sample_size"), num_heads=stored.get("num_attention_heads"),
                 class_dropout_prob=0.1, num_classes=classes)
    return dict(args={}, config=dict(model=model) | (dict(class_names=names) if None not in names else {}))


def write_metadata(folder, metadata):
    """Store what diffusers has no place for in an exported folder."""
    with atomic_write(os.path.join(folder, OUR_METADATA)) as file:
        file.write(json.dumps(metadata, indent=2).encode())


def _read_json(path):
    """Read a dictionary; an empty one if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
