"""The block types: sizes, initial weights, equations; each trains, resumes, samples, compiles and is stored."""
import functools
import hashlib
import math

import pytest
import torch

from common.checkpoint_io import save_checkpoint
from common.compute import ComputeConfig
from helpers import DIGITS, Recompilations
from models import DiT, DiT_models
from networks import CONDITIONINGS, build_dit, infer_conditioning, model_config
from run_files import differences, pixels, stored
from sampling.load_model import load_model
from tiny_models import MODEL_SIZES, TINY_MODEL, count_gmacs, inputs, random_model, reference_attention, reference_mlp

OTHERS = [name for name in CONDITIONINGS if name != "adaln-zero"]
# XL/2 in the paper (table 4, figure 5): parameters in 1e6, multiply-adds in 1e9, of which 0.02 are not counted here.
PAPER = {"in-context": (449, 119.37), "cross-attention": (598, 137.62), "adaln": (600, 118.56),
         "adaln-zero": (675, 118.64)}
# sha256 of names and values of the initial weights of TINY_MODEL with two blocks, seed 0: a change changes every run.
INITIAL_WEIGHTS = {"adaln-zero": "57dcd8f8929286e2", "adaln": "ac90a09fe96a3ec4", "in-context": "2bd15803e619f604",
                   "cross-attention": "1ff90e00f57ac2d9", "adaln-single": "6de76d4174eef26f"}


def expected_parameters(conditioning, depth, d, patch):
    """In closed form. A linear from a to b has ab + b."""
    inputs = 16 * patch**2
    common = (inputs // 4 * d + d) + (256 * d + d) + (d * d + d) + 1001 * d + (inputs // 2 * d + inputs // 2)
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)  # qkv, proj, fc1, fc2
    norm, square = 2 * d, d * d + d
    more, once = {"in-context": (2 * norm, norm),
                  "cross-attention": (3 * norm + 4 * square, norm),
                  "adaln": (4 * square, 2 * square),
                  "adaln-zero": (6 * square, 2 * square),
                  "adaln-single": (6 * d, 6 * square + 2 * d)}[conditioning]
    return common + depth * (block + more) + once


def expected_multiply_adds(conditioning, depth, d, patch, latent):
    """In closed form, of linears and reference_attention alone."""
    tokens, values = (latent // patch) ** 2, 4 * patch**2
    seen = tokens + 2 * (conditioning == "in-context")
    block = 12 * d * d * seen + 2 * seen * seen * d
    more, once = {"in-context": (0, 0),
                  "cross-attention": (2 * d * d * tokens + 2 * d * d * 2 + 2 * tokens * 2 * d, 0),  # q, proj; k, v
                  "adaln": (4 * d * d, 2 * d * d),
                  "adaln-zero": (6 * d * d, 2 * d * d),
                  "adaln-single": (0, 6 * d * d)}[conditioning]
    return tokens * 3 * values * d + 256 * d + d * d + depth * (block + more) + once


def meta_model(name, **config):
    with torch.device("meta"):
        return build_dit(name, **config)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("name", MODEL_SIZES)
def test_parameters_and_multiply_adds_follow_the_formulas(name, conditioning, monkeypatch):
    """At 256 and 512 pixels; multiply-adds are counted with one and two blocks, since all blocks cost the same."""
    depth, width, _, patch, parameters, _ = MODEL_SIZES[name]
    want = expected_parameters(conditioning, depth, width, patch)
    assert conditioning != "adaln-zero" or want == parameters
    monkeypatch.setattr(DiT, "initialize_weights", lambda self: None)  # the meta device has no values
    model = meta_model(name, conditioning=conditioning)
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == want
    for latent in (32, 64):
        one, two = (count_gmacs(meta_model(name, conditioning=conditioning, input_size=latent, depth=count))
                    for count in (1, 2))
        want = expected_multiply_adds(conditioning, depth, width, patch, latent) / 1e9
        assert one + (depth - 1) * (two - one) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("conditioning", PAPER)
def test_full_xl_2_has_the_figures_of_the_paper(conditioning):
    parameters, multiply_adds = PAPER[conditioning]
    model = meta_model("DiT-XL/2", conditioning=conditioning)
    assert round(sum(weight.numel() for weight in model.parameters() if weight.requires_grad) / 1e6) == parameters
    counted = count_gmacs(model)
    assert counted == pytest.approx(expected_multiply_adds(conditioning, 28, 1152, 2, 32) / 1e9, rel=1e-9)
    assert 0 < multiply_adds - counted < 0.025


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_initial_weights_are_frozen(conditioning):
    digest = hashlib.sha256()
    for name, value in build_dit(**TINY_MODEL | dict(depth=2), conditioning=conditioning).state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    assert digest.hexdigest()[:16] == INITIAL_WEIGHTS[conditioning]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_models_start_at_zero_and_gated_blocks_as_the_identity(conditioning):
    model = build_dit(**TINY_MODEL, conditioning=conditioning)
    assert torch.equal(model(*inputs(model)), torch.zeros(3, 8, 4, 4))
    x, c, _ = model.condition(torch.randn(3, 4, 16), torch.randn(3, 16), torch.randn(3, 16))
    assert torch.equal(model.blocks[0](x, c), x) == (conditioning in ("adaln-zero", "adaln-single"))


def test_modulation_of_adaln_starts_xavier_uniform():
    model = build_dit(**TINY_MODEL | dict(hidden_size=64), conditioning="adaln")
    for part, chunks in ((model.blocks[0], 4), (model.final_layer, 2)):
        bound = math.sqrt(6 / (64 + 64 * chunks))
        assert 0.95 * bound < part.adaLN_modulation[1].weight.abs().max() <= bound


def test_tables_of_adaln_single_start_as_in_pixart_with_closed_gates():
    model = build_dit(**TINY_MODEL | dict(hidden_size=1024), conditioning="adaln-single")
    block, last = (part.adaLN_modulation.table for part in (model.blocks[0], model.final_layer))
    assert block.shape == (6, 1024) and last.shape == (2, 1024) and not block[[2, 5]].any()
    for table in (block[[0, 1, 3, 4]], last):
        assert table.std().item() == pytest.approx(1 / 32, rel=0.1)


def normal(x):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def affine(norm, x):
    return normal(x) * norm.weight + norm.bias


def cross_attention(layer, x, c, heads):
    """softmax(q k / sqrt(width of a head)) v, with q of the tokens, k and v of the sequence."""
    q, (k, v) = layer.q(x).unflatten(-1, (heads, -1)), layer.kv(c).unflatten(-1, (2, heads, -1)).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return layer.proj(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2))


def reference_output(conditioning, model, x, t, y):
    """Send tokens x (N, T, D) and embeddings t, y (N, D) through one block and the last layer."""
    block, last, count = model.blocks[0], model.final_layer, x.shape[1]
    c, silu = (t + y)[:, None], torch.nn.functional.silu
    if conditioning == "in-context":
        x = torch.cat([x, t[:, None], y[:, None]], dim=1)
    if conditioning in ("in-context", "cross-attention"):
        x = x + reference_attention(block.attn, affine(block.norm1, x), heads=2)
        if conditioning == "cross-attention":
            x = x + cross_attention(block.cross_attn, affine(block.norm_cross, x), torch.stack([t, y], 1), heads=2)
        x = x + reference_mlp(block.mlp, affine(block.norm2, x))
        return last.linear(affine(last.norm_final, x[:, :count]))
    if conditioning == "adaln":
        shift1, scale1, shift2, scale2 = block.adaLN_modulation[1](silu(c)).chunk(4, dim=-1)
        gate1 = gate2 = 1
        shift, scale = last.adaLN_modulation[1](silu(c)).chunk(2, dim=-1)
    else:
        six = model.condition.adaLN_modulation[1](silu(c)) + block.adaLN_modulation.table.view(1, 1, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six.chunk(6, dim=-1)
        shift, scale = (c + row for row in last.adaLN_modulation.table)
    x = x + gate1 * reference_attention(block.attn, normal(x) * (1 + scale1) + shift1, heads=2)
    x = x + gate2 * reference_mlp(block.mlp, normal(x) * (1 + scale2) + shift2)
    return last.linear(normal(x) * (1 + scale) + shift)


@pytest.mark.parametrize("conditioning", OTHERS)
def test_the_model_follows_the_equations(conditioning):
    model = random_model(conditioning=conditioning)
    x, t, y = inputs(model)
    want = reference_output(conditioning, model, model.x_embedder(x) + model.pos_embed, model.t_embedder(t),
                            model.y_embedder(y, train=False))
    torch.testing.assert_close(model(x, t, y), model.unpatchify(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditioning", OTHERS)
def test_gradients_kernels_and_guidance_do_not_depend_on_the_block_type(conditioning):
    model = random_model(depth=2, conditioning=conditioning)
    x, t, y = inputs(model, n=4)
    out = model(x, t, y)
    assert (out - model(x, t + 300, y)).abs().max() > 1e-3 and (out - model(x, t, (y + 1) % 7)).abs().max() > 1e-3
    for kernel in ("math", "flash"):
        torch.testing.assert_close(ComputeConfig(attention=kernel).wrap(model)(x, t, y), out, rtol=1e-4, atol=1e-4)
    null = model(x[:2], t[:2], torch.full_like(y[:2], 7))
    guided = model.forward_with_cfg(x, t[:2].repeat(2), torch.cat([y[:2], torch.full_like(y[:2], 7)]), 2.0)
    torch.testing.assert_close(guided[:2, :3], (2 * out[:2] - null)[:, :3], rtol=1e-3, atol=1e-3)
    grads = []
    for model.checkpointed in (0.0, 1.0):
        model.train().zero_grad()
        model(x, t, y, torch.zeros(4)).square().mean().backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert all(one is not None and one.any() for one in grads[0].values())
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"conditioning .*adaln-zero, adaln, in-context.*'film'"):
        build_dit(**TINY_MODEL, conditioning="film")
    with pytest.raises(ValueError, match=r"model .*'DiT-M/2'"):
        build_dit("DiT-M/2")


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_stored_configuration_builds_the_same_architecture(conditioning):
    model = build_dit(**TINY_MODEL | dict(input_size=(4, 6), learn_sigma=False), conditioning=conditioning)
    config = model_config(model)
    assert list(config) == ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio",
                            "class_dropout_prob", "num_classes", "learn_sigma", "conditioning"]
    again = build_dit(**config)
    assert type(again) is type(model) is CONDITIONINGS[conditioning] and model_config(again) == config
    again.load_state_dict(model.state_dict(), strict=True)
    assert infer_conditioning(model.state_dict()) == conditioning


def test_a_name_gives_sizes_that_keywords_override():
    config = model_config(meta_model("DiT-B/4", depth=1, conditioning="in-context"))
    assert config == model_config(meta_model(None, patch_size=4, hidden_size=768, num_heads=12, depth=1,
                                             conditioning="in-context"))


def test_weights_of_an_unknown_block_type_count_as_adaln_zero():
    assert infer_conditioning({"x_embedder.proj.weight": torch.zeros(16, 4, 2, 2)}) == "adaln-zero"


@pytest.mark.parametrize("conditioning", OTHERS)
def test_a_resumed_run_is_bit_equal_and_its_checkpoint_samples(run_ok, tmp_path, conditioning):
    flags = [*DIGITS, "--conditioning", conditioning, "--lr", 1e-2, "--ema-decay", 0.5]
    for name, steps, more in (("straight", 6, []), ("cut", 3, []), ("cut", 6, ["--resume", "auto"])):
        run_ok("train", *flags, "--max-steps", steps, *more, "--results-dir", tmp_path / name)
    straight = stored(tmp_path / "straight", 6)
    assert differences(straight, stored(tmp_path / "cut", 6)) == []
    assert straight["config"]["model"]["conditioning"] == straight["args"]["conditioning"] == conditioning
    straight["ema"] = random_model(**straight["config"]["model"]).state_dict()
    torch.save(straight, tmp_path / "x.pt")
    out = run_ok("sample", "--ckpt", tmp_path / "x.pt", "--num-sampling-steps", "ddim3", "--cfg-scale", 3,
                 "--output", tmp_path / "x.png")
    assert f", {conditioning} blocks" in out and pixels(tmp_path / "x.png").std() > 1


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_block_type_of_bare_weights_is_inferred(tmp_path, monkeypatch, conditioning):
    small = dict(hidden_size=16, depth=2, num_heads=2)
    monkeypatch.setitem(DiT_models, "DiT-S/2", functools.partial(DiT, **small))
    model = build_dit(input_size=8, in_channels=3, **small, conditioning=conditioning)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    loaded = load_model(str(tmp_path / "bare.pt"), "DiT-S/2", 8, 1000, "none", set(), "cpu")
    assert model_config(loaded.model) == model_config(model) and loaded.metadata()["conditioning"] == conditioning


def test_a_checkpoint_without_a_block_type_is_adaln_zero(run_ok, run_error, tmp_path):
    flags = [*DIGITS, "--results-dir", tmp_path]
    run_ok("train", *flags, "--max-steps", 1)
    old, path = stored(tmp_path, 1), str(next(tmp_path.glob("*/checkpoints/0000001.pt")))
    del old["config"]["model"]["conditioning"], old["args"]["conditioning"]
    save_checkpoint(path, old)
    again = [*flags, "--max-steps", 2, "--resume", "auto"]
    err = run_error("train", *again, "--conditioning", "in-context", "--override")
    assert "of another model (conditioning=adaln-zero; the flags give conditioning=in-context)" in err
    out = run_ok("sample", "--ckpt", path, "--num-sampling-steps", 2, "--output", tmp_path / "x.png")
    assert ", adaln-zero blocks" in out and pixels(tmp_path / "x.png").any()
    run_ok("train", *again)
    assert stored(tmp_path, 2)["config"]["model"]["conditioning"] == "adaln-zero"


@pytest.mark.parametrize("conditioning", OTHERS)
def test_training_compiles_to_one_graph_without_a_break(conditioning):
    model = random_model(conditioning=conditioning).train()
    x, t, y = inputs(model)
    results = []
    with Recompilations() as compiler:
        for is_compiled in (False, True):
            if is_compiled:
                model.compile(dynamic=False, backend="aot_eager")
            model.zero_grad()
            out = model(x, t, y, torch.zeros(3))
            out.square().mean().backward()
            results.append((out.detach(), [weight.grad for weight in model.parameters() if weight.requires_grad]))
        assert compiler.graphs == 1 and compiler.breaks == 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
