"""The network: its frozen interface, initial weights, parts against closed forms, guidance, invalid input."""
import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch

import models
from models import DiT, DiT_models, DiTConfig, LabelEmbedder, PatchEmbed, TimestepEmbedder, get_2d_sincos_pos_embed
from tiny_models import MODEL_SIZES, TINY_MODEL, count_gmacs, inputs, random_model, reference_attention, reference_mlp


def patches(x, p):
    """List the p x p patches (N, C, p, p) of x (N, C, H, W) in row-major order."""
    return [x[:, :, i:i + p, j:j + p] for i in range(0, x.shape[2], p) for j in range(0, x.shape[3], p)]


def published_shapes(depth, width, patch, tokens, classes=1000, channels=4):
    """Return names and shapes of the weights in a published checkpoint of that size."""
    linears = {
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (2 * channels * patch**2, width),
    }
    for i in range(depth):
        for layer, rows, columns in [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4),
                                     ("adaLN_modulation.1", 6, 1)]:
            linears[f"blocks.{i}.{layer}"] = (rows * width, columns * width)
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
    }
    for name, shape in linears.items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]
    return shapes


def test_table_lists_the_twelve_sizes():
    assert set(DiT_models) == set(MODEL_SIZES)
    for name in MODEL_SIZES:
        assert DiT_models[name] is getattr(models, name.replace("-", "_").replace("/", "_"))


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_weights_parameters_and_multiply_adds_are_the_published_ones(name):
    depth, width, heads, patch, parameters, multiply_adds = MODEL_SIZES[name]
    with torch.device("meta"):
        model = DiT_models[name]()
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == \
        published_shapes(depth, width, patch, tokens=(32 // patch) ** 2)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == parameters
    assert (model.num_heads, model.patch_size, len(model.blocks)) == (heads, patch, depth)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert count_gmacs(model) == pytest.approx(multiply_adds, abs=0.0051)  # the reference has two decimals


def test_multiply_adds_at_512_pixels():
    with torch.device("meta"):
        model = models.DiT_XL_2(input_size=64)
    assert count_gmacs(model) == pytest.approx(524.54, abs=0.0051)


def test_published_names_exist():
    model = DiT(**TINY_MODEL)
    classes = "PatchEmbed TimestepEmbedder LabelEmbedder DiTBlock FinalLayer modulate get_2d_sincos_pos_embed"
    members = "x_embedder t_embedder y_embedder pos_embed blocks final_layer unpatchify"
    for owner, names in ((models, classes), (model, members)):
        assert [name for name in names.split() if not hasattr(owner, name)] == []
    assert (model.in_channels, model.out_channels, model.patch_size, model.num_heads) == (4, 8, 2, 2)
    assert model.learn_sigma is True
    assert DiT(**TINY_MODEL, learn_sigma=False).out_channels == 4


def test_public_members_describe_samples_and_conditions():
    model = DiT(**TINY_MODEL | dict(input_size=(4, 6)))
    assert model.sample_shape == (4, 4, 6) and model.device == torch.device("cpu") and model.has_null_condition
    assert model.null_condition(dict(y=torch.tensor([0, 3])))["y"].tolist() == [7, 7]
    assert not DiT(**TINY_MODEL, class_dropout_prob=0).has_null_condition


def test_config_is_frozen_and_has_the_arguments_of_the_constructor():
    defaults = {name: p.default for name, p in inspect.signature(DiT).parameters.items()}
    assert dataclasses.asdict(DiTConfig()) == defaults
    config = DiT(**TINY_MODEL, mlp_ratio=2, learn_sigma=False).config
    assert config == DiTConfig(**TINY_MODEL, mlp_ratio=2, learn_sigma=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 2


def leading(function, count):
    return list(inspect.signature(function).parameters)[:count]


def test_signatures_keep_the_published_order_and_defaults():
    constructor = {name: p.default for name, p in inspect.signature(DiT).parameters.items()}
    assert list(constructor.items()) == list(dict(
        input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
        class_dropout_prob=0.1, num_classes=1000, learn_sigma=True).items())
    for function, names in [
        (DiT.forward, ["self", "x", "t", "y"]),
        (DiT.forward_with_cfg, ["self", "x", "t", "y", "cfg_scale"]),
        (DiT.unpatchify, ["self", "x"]),
        (TimestepEmbedder.timestep_embedding, ["t", "dim"]),
        (LabelEmbedder.forward, ["self", "labels", "train"]),
        (LabelEmbedder.token_drop, ["self", "labels"]),
        (get_2d_sincos_pos_embed, ["embed_dim", "grid_size"]),
        (models.modulate, ["x", "shift", "scale"]),
    ]:
        required = [name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty]
        assert required == leading(function, len(names)) == names
    assert inspect.signature(TimestepEmbedder.timestep_embedding).parameters["max_period"].default == 10000
    assert leading(LabelEmbedder.forward, 4)[3] == leading(LabelEmbedder.token_drop, 3)[2] == "force_drop_ids"


def test_initial_distributions():
    """Xavier-uniform linears, the patch projection as a linear of p * p * C inputs, 0.02 for the embeddings."""
    model = DiT(input_size=16, patch_size=4, hidden_size=256, depth=1, num_heads=4)
    block = model.blocks[0]
    for layer, fan_in, fan_out in [(model.x_embedder.proj, 64, 256), (block.attn.qkv, 256, 768),
                                   (block.attn.proj, 256, 256), (block.mlp.fc1, 256, 1024), (block.mlp.fc2, 1024, 256)]:
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.999 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight,
                   model.t_embedder.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert weight.abs().max() > 3 * 0.02  # normal, not uniform
    zero = [name for name, value in model.state_dict().items() if not value.any()]
    assert set(zero) == {name for name in model.state_dict() if name.endswith("bias")} | {
        "blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"}


@pytest.mark.parametrize("grid, rows, columns", [((2, 5), 2, 5), (3, 3, 3)])
def test_position_table_encodes_column_and_row(grid, rows, columns):
    """Sines and cosines of the column in the first half of the width, of the row in the second."""
    table = get_2d_sincos_pos_embed(12, grid)
    assert table.shape == (rows * columns, 12)
    frequencies = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    for row in range(rows):
        for column in range(columns):
            want = [wave(position * f) for position in (column, row) for wave in (math.sin, math.cos)
                    for f in frequencies]
            np.testing.assert_allclose(table[row * columns + column], want, atol=1e-12)


def test_position_table_of_a_model_is_frozen():
    model = DiT(**TINY_MODEL | dict(input_size=(4, 10)))
    assert not model.pos_embed.requires_grad
    np.testing.assert_allclose(model.pos_embed[0].numpy(), get_2d_sincos_pos_embed(16, (2, 5)), atol=1e-7)


@pytest.mark.parametrize("dim, max_period", [(8, 10000), (7, 10000), (6, 50)])
def test_timestep_features_are_cosines_then_sines(dim, max_period):
    t = [0.0, 1.0, 12.25, 999.0]
    frequencies = [max_period ** (-i / (dim // 2)) for i in range(dim // 2)]
    want = [[wave(s * f) for wave in (math.cos, math.sin) for f in frequencies] + [0.0] * (dim % 2) for s in t]
    got = TimestepEmbedder.timestep_embedding(torch.tensor(t), dim, max_period)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=2e-4)  # float32 angles of up to 999 radians
    integers = TimestepEmbedder.timestep_embedding(torch.tensor([0, 1, 999]), dim, max_period)
    assert torch.equal(integers, got[[0, 1, 3]])


def test_timestep_features_are_float32_in_half_precision():
    """bfloat16 holds only even integers above 256."""
    embedder = TimestepEmbedder(16)
    torch.nn.init.normal_(embedder.mlp[0].weight)
    torch.nn.init.normal_(embedder.mlp[2].weight)
    embedder.bfloat16()
    t = torch.tensor([600, 601])
    out = embedder(t)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, embedder.mlp(TimestepEmbedder.timestep_embedding(t, 256).bfloat16()))


@pytest.mark.parametrize("size", [(8, 12), (12, 4)])
def test_patch_embedding_is_a_linear_map_of_flattened_patches(size):
    embed = PatchEmbed(size, 4, 3, 16)
    x = torch.randn(2, 3, *size)
    want = [patch.flatten(1) @ embed.proj.weight.flatten(1).T + embed.proj.bias for patch in patches(x, 4)]
    torch.testing.assert_close(embed(x), torch.stack(want, dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, p", [((8, 12), 2), ((8, 12), 4), (8, 8)])
def test_unpatchify_undoes_patchify(size, p):
    """A token holds its patch row by row, the channels of a pixel together."""
    model = DiT(**TINY_MODEL | dict(input_size=size, patch_size=p))
    image = torch.randn(2, 8, *((size, size) if isinstance(size, int) else size))
    tokens = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches(image, p)], dim=1)
    assert torch.equal(model.unpatchify(tokens), image)


def test_block_follows_the_equations():
    """x += gate * f(LN(x) (1 + scale) + shift), for attention, then for the MLP; the chunks in that order."""
    block = random_model().blocks[0]
    x, c = 0.01 * torch.randn(2, 4, 16), torch.randn(2, 16)  # so small that the norm's eps of 1e-6 counts
    chunks = torch.nn.functional.silu(c) @ block.adaLN_modulation[1].weight.T + block.adaLN_modulation[1].bias
    chunks = chunks[:, None].chunk(6, dim=-1)
    want = x
    for part, (shift, scale, gate) in [(lambda x: reference_attention(block.attn, x, heads=2), chunks[:3]),
                                       (lambda x: reference_mlp(block.mlp, x), chunks[3:])]:
        centered = want - want.mean(-1, keepdim=True)
        normal = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        want = want + gate * part(normal * (1 + scale) + shift)
    torch.testing.assert_close(block(x, c), want, rtol=1e-4, atol=1e-5)


def test_null_class_is_the_number_of_classes():
    assert LabelEmbedder(7, 16, 0.1).embedding_table.num_embeddings == 8
    assert LabelEmbedder(7, 16, 0.0).embedding_table.num_embeddings == 7
    labels = torch.tensor([0, 3, 6])
    dropped = LabelEmbedder(7, 16, 0.1).token_drop(labels, force_drop_ids=torch.tensor([1, 0, 1]))
    assert dropped.tolist() == [7, 3, 7]
    assert labels.tolist() == [0, 3, 6]  # the caller's labels are left alone


def test_labels_are_dropped_at_the_given_rate():
    n, rate = 20_000, 0.3
    labels = torch.randint(7, (n,))
    dropped = LabelEmbedder(7, 16, rate).token_drop(labels)
    null = dropped == 7
    assert null.float().mean().item() == pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / n))
    assert torch.equal(dropped[~null], labels[~null])


def test_labels_are_dropped_in_training_only():
    model = random_model(class_dropout_prob=1.0)
    x, t, y = inputs(model)
    null = torch.full_like(y, 7)
    with_labels, without = model(x, t, y), model(x, t, null)
    assert not torch.allclose(with_labels, without)
    model.train()
    assert torch.equal(model(x, t, y), without)
    assert torch.equal(model(x, t, y, force_drop_ids=torch.zeros(3)), with_labels)
    model.eval()
    assert torch.equal(model(x, t, y, force_drop_ids=torch.ones(3)), without)


def test_a_model_without_dropout_trains_on_the_labels():
    model = random_model(class_dropout_prob=0.0)
    x, t, y = inputs(model)
    want = model(x, t, y)
    assert torch.equal(model.train()(x, t, y), want)


def guided(model, x, t, y, scale, **kwargs):
    null = torch.full_like(y, model.y_embedder.num_classes)
    return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), scale, **kwargs)


@pytest.mark.parametrize("channels, cfg_channels, expected", [
    (4, None, 3), (4, 4, 4), (4, 1, 1), (1, None, 1), (3, None, 3), (16, None, 16)])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_guidance_changes_the_noise_alone(channels, cfg_channels, expected, learn_sigma):
    """By default three of four channels, all of any other number; never the variance."""
    model = random_model(in_channels=channels, learn_sigma=learn_sigma)
    x, t, y = inputs(model)
    cond, null = model(x, t, y), model(x, t, torch.full_like(y, 7))
    assert (cond - null).abs().amin(dim=(0, 2, 3)).min() > 0  # every channel can show guidance
    eps = null + 2.5 * (cond - null)
    want = torch.cat([torch.cat([eps[:, :expected], out[:, expected:]], dim=1) for out in (cond, null)])
    torch.testing.assert_close(guided(model, x, t, y, 2.5, cfg_channels=cfg_channels), want, rtol=1e-4, atol=1e-4)


def test_scale_1_is_the_conditional_pass():
    model = random_model()
    x, t, y = inputs(model)
    assert torch.equal(guided(model, x, t, y, 1.0), model(x, t, y).repeat(2, 1, 1, 1))


def test_guidance_does_not_read_the_second_half_of_x():
    model = random_model()
    x, t, y = inputs(model, n=4)
    y[2:] = 7
    spoiled = torch.cat([x[:2], torch.full_like(x[2:], torch.nan)])
    assert torch.equal(model.forward_with_cfg(spoiled, t, y, 4.0), model.forward_with_cfg(x, t, y, 4.0))


@pytest.mark.parametrize("overrides, message", [
    (dict(input_size=9), r"\(9, 9\).*patch_size 2"),
    (dict(input_size=(4, 7)), r"\(4, 7\).*patch_size 2"),
    (dict(input_size=(4, 4, 4)), r"input_size.*\(4, 4, 4\)"),
    (dict(input_size=0), r"input_size.*0"),
    (dict(patch_size=0), r"patch_size must be a positive integer .* not 0"),
    (dict(input_size=2.5), r"input_size.*2\.5"),
    (dict(input_size="4"), r"input_size.*'4'"),
    (dict(hidden_size=16, num_heads=3), r"hidden_size 16.*num_heads 3"),
    (dict(hidden_size=6), r"multiple of 4, not 6"),
    (dict(class_dropout_prob=1.5), r"class_dropout_prob.*1\.5"),
    (dict(class_dropout_prob=-0.1), r"class_dropout_prob.*-0\.1"),
])
def test_sizes_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        DiT(**TINY_MODEL | overrides)


@pytest.mark.parametrize("dropout, labels, message", [
    (0.1, [0, 8], r"0 \.\. 7 \(7 classes and the null class\), got 0 \.\. 8"),
    (0.1, [-1, 3], r"0 \.\. 7 .*got -1 \.\. 3"),
    (0.0, [2, 7], r"0 \.\. 6 \(7 classes, no null class\), got 2 \.\. 7"),
])
def test_labels_out_of_range_are_refused(dropout, labels, message):
    model = DiT(**TINY_MODEL, class_dropout_prob=dropout)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 4, 4, 4), torch.zeros(2), torch.tensor(labels))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3, 4, 4), (2, 4, 4), (2, 4, 4, 4, 1)])
def test_inputs_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(4, 4, 4\), got \(" + ", ".join(map(str, shape[1:]))):
        DiT(**TINY_MODEL)(torch.zeros(shape), torch.zeros(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("tokens, values", [(5, 32), (4, 31)])
def test_tokens_of_the_wrong_shape_are_refused(tokens, values):
    with pytest.raises(ValueError, match=rf"\({tokens}, {values}\).*2 x 2 patches of 2 x 2 x 8"):
        DiT(**TINY_MODEL).unpatchify(torch.zeros(2, tokens, values))


def test_guidance_without_a_null_class_is_refused():
    model = DiT(**TINY_MODEL, class_dropout_prob=0.0)
    x, t, y = inputs(model, n=2)
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        model.forward_with_cfg(x, t, y, 4.0)
    with pytest.raises(ValueError, match="class_dropout_prob=0"):
        model(x, t, y, force_drop_ids=torch.ones(2))


def test_guidance_of_an_odd_batch_or_below_scale_1_is_refused():
    model = DiT(**TINY_MODEL)
    with pytest.raises(ValueError, match="odd batch of 3"):
        model.forward_with_cfg(*inputs(model), 4.0)
    with pytest.raises(ValueError, match=r"cfg_scale.*0\.5"):
        model.forward_with_cfg(*inputs(model, n=2), 0.5)


@pytest.mark.parametrize("channels", [0, -1, 5])
def test_guided_channels_must_be_channels_of_the_latents(channels):
    model = DiT(**TINY_MODEL)
    with pytest.raises(ValueError, match=rf"cfg_channels .*1 \.\. 4.*{channels}"):
        model.forward_with_cfg(*inputs(model, n=2), 2.0, cfg_channels=channels)
