"""The flags of speed: each computes what the plain way computes, up to the rounding that it is about."""
import collections

import pytest
import torch
from torch.nn.attention import SDPBackend

from autoencoder.vae import IdentityAutoencoder
from common import compute
from common.compute import DEFAULT_COMPUTE, Bf16InferenceModel, ComputeConfig, fastest_config, find_compiler_error
from common.errors import UserError
from diffusion import create_diffusion
from helpers import DIGITS, Recompilations, differences, scalars, stored
from networks import CONDITIONINGS, build_dit
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline

CPU = torch.device("cpu")
RUN = [*DIGITS, "--log-every", 1, "--lr", 1e-3, "--ema-decay", 0.9]


def small_model(**more):
    torch.manual_seed(0)
    model = build_dit(**dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=2,
                             num_classes=10) | more)
    for weight in model.parameters():  # nothing that is zero at the start may hide a difference
        torch.nn.init.normal_(weight, std=0.05)
    return model


def inputs(count=4):
    torch.manual_seed(1)
    return torch.randn(count, 4, 8, 8), torch.randint(0, 1000, (count,)), torch.randint(0, 10, (count,))


# ---------------------------------------------------------------- precision

def test_bf16_is_about_the_network_alone(monkeypatch):
    """Matrix products of the blocks in bfloat16; timestep embedding, output, weights and gradients in float32."""
    model, seen = small_model().train(), {}
    for name, module in (("qkv", model.blocks[0].attn.qkv), ("t", model.t_embedder.mlp[2]),
                         ("last", model.final_layer)):
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.dtype}))
    x, t, y = inputs()
    out = ComputeConfig("bf16").of(model)(x, t, y)
    assert seen == dict(qkv=torch.bfloat16, t=torch.float32, last=torch.bfloat16) and out.dtype == torch.float32
    out.square().mean().backward()
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    plain = model(x, t, y)
    assert 0 < (out - plain).abs().max() < 0.03 * plain.abs().max()


def test_the_timestep_embedding_is_that_of_float32():
    """Bit for bit: of a timestep of 999, bfloat16 would keep eight bits."""
    model, (_, t, _) = small_model(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.t_embedder(t), small_model().t_embedder(t))


@pytest.mark.parametrize("flags, tolerance", [
    (["--precision", "bf16"], 0.02), (["--precision", "fp32"], 0), (["--fused-adamw"], 1e-4),
    (["--attention", "math"], 1e-4), (["--grad-checkpointing", 0.5], 0)])
def test_two_hundred_steps(command, tmp_path, flags, tolerance):
    """The loss of each of 200 steps, beside the plain way; the checkpoint has the same names and types."""
    for name, extra in (("plain", []), ("fast", flags)):
        status, _, err = command("train", *RUN, "--depth", 2, "--max-steps", 200, *extra, "--results-dir",
                                 tmp_path / name)
        assert status == 0, err
    plain, fast = scalars(tmp_path / "plain"), scalars(tmp_path / "fast")
    assert len(plain) == 200 and max(abs(plain[step] - fast[step]) for step in plain) <= tolerance
    one, two = stored(tmp_path / "plain", 200), stored(tmp_path / "fast", 200)
    for part in ("model", "ema"):
        assert {name: (weight.shape, weight.dtype) for name, weight in one[part].items()} == {
            name: (weight.shape, weight.dtype) for name, weight in two[part].items()}
    assert (differences(one, two) == []) == (tolerance == 0)


def test_another_precision_needs_to_be_confirmed(command, tmp_path):
    """--fast is recorded as what it chose; compiling and kernels may change without a word."""
    command("train", *RUN, "--max-steps", 1, "--results-dir", tmp_path)
    status, _, err = command("train", *RUN, "--max-steps", 2, "--precision", "bf16", "--resume", "auto",
                             "--results-dir", tmp_path)
    assert status == 2 and "--precision is bf16, it was tf32" in err
    status, _, err = command("train", *RUN, "--max-steps", 2, "--attention", "math", "--fused-adamw",
                             "--grad-checkpointing", "--resume", "auto", "--results-dir", tmp_path)
    assert status == 0, err


# ---------------------------------------------------------------- checkpointing and kernels

@pytest.mark.parametrize("share, blocks", [(0.0, []), (0.5, [1, 3]), (1.0, [0, 1, 2, 3]), (0.25, [3])])
def test_which_blocks_are_checkpointed(share, blocks):
    """At equal distances; in training only; the gradients are the same bit for bit."""
    grads = []
    for checkpointed in (0.0, share):
        model = small_model(depth=4).train()
        model.checkpointed, calls = checkpointed, collections.Counter()
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.update([i]))
        x, t, y = inputs()
        model(x, t, y, torch.zeros(4)).square().mean().backward()
        grads.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    assert [i for i in range(4) if calls[i] == 2] == blocks
    assert all(torch.equal(one, two) for one, two in zip(*grads))
    model.eval()(x, t, y)
    assert calls.total() == 4 + len(blocks) + 4


def test_attention_kernels():
    """The flag reaches the attention, and a kernel that is not there is a sentence."""
    model, (x, t, y) = small_model().eval(), inputs()
    plain = model(x, t, y)
    with torch.no_grad():
        torch.testing.assert_close(ComputeConfig(attention="flash").of(model)(x, t, y), plain, rtol=1e-4, atol=1e-5)
    ComputeConfig(attention="flash").check(CPU)
    with pytest.raises(UserError, match="--attention cudnn: torch has no such kernel for tf32 on cpu"):
        ComputeConfig(attention="cudnn").check(CPU)


@pytest.mark.parametrize("precision, tolerance", [("tf32", 1e-4), ("bf16", 0.03)])
def test_attention_by_products(monkeypatch, precision, tolerance):
    """--attention math: torch's kernels are not called, and it computes the same, its gradients too."""
    x, t, y = inputs()
    results = []
    for way in (DEFAULT_COMPUTE, ComputeConfig(precision, attention="math")):
        model = small_model().train()
        way.set_up(model)
        if way != DEFAULT_COMPUTE:
            monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        out = way.of(model)(x, t, y, torch.zeros(4))
        out.square().mean().backward()
        results.append([out, model.blocks[0].attn.qkv.weight.grad])
    for plain, own in zip(*results):
        assert 0 < (plain - own).abs().max() < tolerance * plain.abs().max()


def test_the_kernel_is_the_one_that_was_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(compute, "sdpa_kernel", lambda kernel: seen.append(kernel) or torch.no_grad())
    ComputeConfig(attention="efficient").of(small_model())(*inputs())
    assert seen == [SDPBackend.EFFICIENT_ATTENTION]


# ---------------------------------------------------------------- sampling in bfloat16

@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_weights_rounded_once_are_those_of_autocast(conditioning):
    """Bit for bit, also after the weights have moved on; the model itself keeps its weights."""
    model, (x, t, y) = small_model(conditioning=conditioning).eval(), inputs()
    way = ComputeConfig("bf16")
    rounded = Bf16InferenceModel(model, way)
    for change in (0.0, 0.1):
        for weight in model.parameters():
            weight.data += change
        assert torch.equal(way.of(rounded())(x, t, y), way.of(model)(x, t, y))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert rounded.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert rounded.model.t_embedder.mlp[0].weight.dtype == torch.float32


# ---------------------------------------------------------------- compilation


needs_compiler = pytest.mark.skipif(find_compiler_error(CPU) is not None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("by_block, depth, steps", [(False, 2, 200), (True, 9, 4)])
def test_compiled_training(by_block, depth, steps):
    """The losses of the plain way over 200 steps, no graph break, nothing compiled after the first, the same names."""
    losses, names = [], []
    diffusion = create_diffusion("")
    with Recompilations() as seen:
        for is_compiled in (False, True):
            model = small_model(depth=depth).train()
            names.append(list(model.state_dict()))
            if is_compiled:
                ComputeConfig(compile=True).set_up(model, by_block)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            rows = []
            for step in range(steps):
                torch.manual_seed(step)
                x, t, y = inputs()
                loss = diffusion.training_losses(model, x, t, dict(y=y, force_drop_ids=torch.zeros(4)),
                                                 torch.randn(4, 4, 8, 8))["loss"].mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                rows.append(loss.item())
                if step == 2:
                    early = seen.graphs
            losses.append(rows)
            names.append(list(model.state_dict()))
        assert early == 1 and seen.graphs == early and seen.breaks == 0
    assert max(abs(one - two) for one, two in zip(*losses)) < 1e-3 and names.count(names[0]) == 4


@needs_compiler
def test_compiled_sampling():
    """The same samples; a last batch that is smaller compiles nothing anew."""
    def samples(compute):
        make = build_pipeline(small_model(depth=1).eval(), IdentityAutoencoder(4), 4, cfg_scale=4.0, compute=compute)
        return [make(torch.arange(count), PerSampleRNG(0, range(count), CPU)) for count in (5, 3)]

    plain = samples(DEFAULT_COMPUTE)
    with Recompilations() as seen:
        fast = samples(ComputeConfig(compile=True))
        assert seen.graphs == 1 and seen.breaks == 0
    for one, two in zip(plain, fast):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * one.abs().max().item())
    assert torch.equal(plain[0][:3], plain[1]) or torch.allclose(plain[0][:3], plain[1], atol=1e-4)


def test_without_a_compiler(command, tmp_path, monkeypatch):
    """--compile says so and goes on."""
    def broken(*args, **more):
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    status, out, err = command("train", *RUN, "--max-steps", 2, "--compile", "--results-dir", tmp_path)
    assert status == 0, err
    assert "WARNING: --compile: there is no working compiler here (no C++ compiler found); going on without" in out


# ---------------------------------------------------------------- --fast

@pytest.mark.parametrize("has_bf16", [False, True])
def test_what_fast_means(command, tmp_path, monkeypatch, has_bf16):
    """bf16 only where the CPU has it; what was typed wins; what it chose is said, and kept in the checkpoint."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=has_bf16), raising=False)
    precision = "bf16" if has_bf16 else "tf32"
    assert fastest_config(CPU) == ComputeConfig(precision, compile=True, attention="math")
    status, out, err = command("train", *DIGITS, "--fast", "--no-compile", "--max-steps", 1, "--results-dir", tmp_path)
    assert status == 0, err
    assert f"--fast: --precision {precision} --no-compile --attention math --fused-adamw" in out
    args = stored(tmp_path, 1)["args"]
    assert (args["precision"], args["compile"], args["fused_adamw"]) == (precision, False, True)


def test_sampling_takes_the_flags(command, tmp_path):
    """sample.py and sample_ddp.py; a set in bf16 has another name, and its record says so."""
    command("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)
    path = next(tmp_path.glob("*/checkpoints/0000001.pt"))
    few = ["--ckpt", path, "--num-sampling-steps", "ddim2", "--precision", "bf16"]
    status, out, err = command("sample", *few, "--output", tmp_path / "x.png")
    assert status == 0 and '"precision": "bf16"' in out, err
    status, _, err = command("sample_ddp", *few, "--num-fid-samples", 3, "--sample-dir", tmp_path / "set")
    assert status == 0 and len(list((tmp_path / "set").glob("*-bf16.npz"))) == 1, err


def test_cuda_graphs_need_a_gpu(command, tmp_path):
    status, _, err = command("train", *RUN, "--max-steps", 1, "--cuda-graphs", "--results-dir", tmp_path)
    assert status == 2 and "--cuda-graphs needs a GPU, and --compile" in err and "cpu, without --compile" in err


def test_a_model_that_gets_its_weights_later_is_not_copied():
    """Under --fsdp the average to sample from is whole only for a while."""
    model = small_model().eval()
    weights = model.state_dict()
    make = build_pipeline(model.to("meta"), IdentityAutoencoder(4), 2, cfg_scale=1.0, compute=ComputeConfig("bf16"))
    model.to_empty(device="cpu").load_state_dict(weights)
    labels = torch.arange(3)
    own = make(labels, PerSampleRNG(0, range(3), CPU))
    plain = build_pipeline(model, IdentityAutoencoder(4), 2, cfg_scale=1.0, compute=ComputeConfig("bf16"))
    assert make.network().blocks is model.blocks and torch.equal(own, plain(labels, PerSampleRNG(0, range(3), CPU)))
