"""Decide the sizes of a checkpoint's model: its weights count, before flags that were typed, stored or are defaults."""
import math

import models
from autoencoder.vae import VAE_NAMES, latent_size
from common.errors import ArgumentError, UserError
from common.state_dicts import ANCHOR, shorten
from networks import build_dit, infer_config


class ModelResolver:
    """Finds the arguments of `build_dit` for a checkpoint.

    A typed flag that contradicts the weights raises an `ArgumentError`; a stored one gives a line in `corrections`.

    Args:
        state_dict (dict[str, Tensor]): Weights that were selected.
        metadata (CheckpointMetadata): What the checkpoint holds in addition.
        path (str): Its path.
        flags (dict): Values of the flags model, image_size, num_classes and vae.
        explicit_args (set[str]): Names of those that were typed.
    """

    def __init__(self, state_dict, metadata, path, flags, explicit_args):
        self.state_dict, self.metadata, self.path = state_dict, metadata, path
        self.flags, self.explicit_args = flags, explicit_args
        self.corrections = []
        self.config = dict(metadata.architecture)
        try:
            inferred = infer_config(state_dict)
        except (LookupError, TypeError, ValueError) as error:
            problem = str(error) if ANCHOR in state_dict else f"it has {shorten(state_dict)}, but no {ANCHOR}"
            raise UserError(f"{path} holds no weights of a DiT that this code knows: {problem}") from None
        if self._is_rounded(self.config.get("mlp_ratio"), inferred):
            inferred["mlp_ratio"] = self.config["mlp_ratio"]
        for name, value in inferred.items():
            if name in self.config and self.config[name] != value:
                self._correct(name, self.config[name], value)
        self.config |= inferred
        self.name = self._choose_name()
        self.config["num_heads"] = self._choose_heads()
        self.num_classes = self._choose_classes()

    def _correct(self, name, stored, actual):
        self.corrections.append(f"{name} is {actual}, not {stored}")

    @staticmethod
    def _is_rounded(ratio, inferred):
        width = inferred["hidden_size"]
        return isinstance(ratio, (int, float)) and int(width * ratio) == int(width * inferred["mlp_ratio"])

    def _error(self, name, actual):
        return ArgumentError(f"the weights in {self.path} do not fit this model: they are of {actual}. Leave this out.",
                             **{name: self.flags[name]})

    # ------------------------------------------------------------ architecture

    def _named_sizes(self):
        """Yield (name, width, depth, patch size, heads) of the models in `DiT_models`."""
        for name, constructor in models.DiT_models.items():
            sizes = vars(models.DiTConfig(**constructor.keywords))
            yield name, sizes["hidden_size"], sizes["depth"], sizes["patch_size"], sizes["num_heads"]

    def _choose_name(self):
        width, depth, patch_size = (self.config[name] for name in ("hidden_size", "depth", "patch_size"))
        names = [name for name, *sizes, _ in self._named_sizes() if sizes == [width, depth, patch_size]]
        description = f"DiT (depth {depth}, width {width}, patch size {patch_size})"
        stored, typed = self.metadata.model, self.flags["model"]
        if self.metadata.architecture and stored:  # train.py: its name is that of the size which flags changed
            names = [stored, *names]
        if "model" in self.explicit_args and typed not in names:
            raise self._error("model", " or ".join(names) or description)
        if stored and stored not in models.DiT_models:  # a name of somebody else's
            names.append(stored)
        elif stored and stored not in names:
            self._correct("model", stored, (names or [description])[0])
        return next((name for name in (typed, stored) if name in names), (names or [description])[0])

    def _choose_heads(self):
        """Return the number of heads, which no weight tells: as stored, or that of the paper's model of this width."""
        heads = {width: num_heads for _, width, _, _, num_heads in self._named_sizes()}
        width = self.config["hidden_size"]
        stored = self.config.get("num_heads") or self.metadata.num_heads
        if stored and width % stored == 0:
            return stored
        if width not in heads:
            problem = f"is {stored}, which does not divide it" if stored else "is not stored"
            raise UserError(f"the weights in {self.path} do not fit this model: no model of the paper has their width "
                            f"{width}, and the number of attention heads {problem}. Store it in the file, as "
                            "args={'num_heads': ...}")
        if stored:
            self._correct("num_heads", stored, heads[width])
        return heads[width]

    def _choose_classes(self):
        """Return the number of classes, and set whether there is a null class: the table has one more row for it."""
        table = self.state_dict.get("y_embedder.embedding_table.weight")
        if table is None:
            raise UserError(f"{self.path} holds no class table (y_embedder.embedding_table.weight): this is not the "
                            "class-conditional DiT of this code")
        rows, dropout = len(table), self.config.get("class_dropout_prob")
        stored = self.config.get("num_classes", self.metadata.num_classes)
        if stored is not None and dropout is not None and rows == stored + (dropout > 0):
            count = stored
        else:
            candidates = [self.flags["num_classes"]] if "num_classes" in self.explicit_args else [
                stored, self.flags["num_classes"]]
            count = next((value for value in candidates if value in (rows - 1, rows)), rows - 1)
            if stored is not None and stored not in (rows - 1, rows):
                self._correct("num_classes", stored, count)
            self.config["class_dropout_prob"] = 0.0 if rows == count else dropout or 0.1
        if count < 1:
            raise UserError(f"the class table of {self.path} has {rows} row(s), the null class at most: this model was "
                            "trained without classes, which this code cannot sample")
        if "num_classes" in self.explicit_args and self.flags["num_classes"] != count:
            raise self._error("num_classes", f"{count} classes")
        self.config["num_classes"] = count
        return count

    # ------------------------------------------------------------ image size

    def choose_vae(self):
        """Return the autoencoder to load: the typed one, that of a training run, or the default."""
        vae, stored = self.flags["vae"], self.metadata.vae
        # The published sample.py takes another decoder than training did; other autoencoders cannot be exchanged.
        if self.metadata.architecture and "vae" not in self.explicit_args and stored not in (None, *VAE_NAMES):
            vae = stored
        if vae in VAE_NAMES and self.config["in_channels"] != 4:
            raise ArgumentError(f"this autoencoder has latents of 4 channels, the model in {self.path} takes "
                                f"{self.config['in_channels']}. Name that of its training, or none (pixels).", vae=vae)
        return vae

    def choose_image_size(self, autoencoder):
        """Return the image size in pixels, and set that of the latents: the table of positions tells it."""
        is_typed, stored = "image_size" in self.explicit_args, self.metadata.image_size
        size = self.flags["image_size"] if is_typed else stored or self.flags["image_size"]
        tokens, patch_size = self._count_tokens(), self.config["patch_size"]
        if tokens is not None and tokens == self._count_tokens_of(self.config.get("input_size")):
            side = self.config["input_size"]  # as train.py stored it, which may be a rectangle
            actual = size if not isinstance(side, int) else side * autoencoder.stride
        elif tokens is not None and math.isqrt(tokens) ** 2 == tokens:
            side = math.isqrt(tokens) * patch_size
            actual = side * autoencoder.stride
        else:  # `load_weights` computes the table if it is missing, and reports one that does not fit
            side, actual = latent_size(autoencoder, size), size
        if is_typed and size != actual:
            raise self._error("image_size", f"{actual} pixels with the VAE {autoencoder.name}")
        if stored is not None and stored != actual and not is_typed:
            self._correct("image_size", stored, actual)
        self.config["input_size"] = side
        return actual

    def _count_tokens(self):
        positions = self.state_dict.get("pos_embed")
        return positions.shape[1] if positions is not None and positions.ndim == 3 else None

    def _count_tokens_of(self, input_size):
        try:
            return math.prod(side // self.config["patch_size"] for side in models.as_pair(input_size, "input_size"))
        except ValueError:
            return None

    def build(self):
        """Build the network, with its initial weights."""
        try:
            return build_dit(**self.config)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.path} describes a model that cannot be built: {error}") from None
