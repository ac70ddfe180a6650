"""Compute flags: each gives the default results, up to its rounding."""
import collections

import pytest
import torch
from torch.nn.attention import SDPBackend

from autoencoder.vae import IdentityAutoencoder
from common import compute
from common.compute import DEFAULT_COMPUTE, Bf16InferenceModel, ComputeConfig, fastest_config, find_compiler_error
from diffusion import create_diffusion
from helpers import DIGITS, Recompilations, raises_argument
from networks import CONDITIONINGS
from run_files import differences, scalars, stored
from sampling.noise import PerSampleRNG
from sampling.pipeline import build_pipeline
from tiny_models import inputs, random_model

CPU = torch.device("cpu")
RUN = [*DIGITS, "--log-every", 1, "--lr", 1e-3, "--ema-decay", 0.9]


def small_model(**config):
    return random_model(scale=0.05, **dict(input_size=8, hidden_size=32, depth=3, num_classes=10) | config)


def test_bf16_leaves_weights_gradients_timesteps_and_output_in_float32(monkeypatch):
    model, seen = small_model().train(), {}
    for name, module in (("qkv", model.blocks[0].attn.qkv), ("t", model.t_embedder.mlp[2]),
                         ("last", model.final_layer)):
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output.dtype}))
    x, t, y = inputs(model, n=4)
    out = ComputeConfig("bf16").wrap(model)(x, t, y)
    assert seen == dict(qkv=torch.bfloat16, t=torch.float32, last=torch.bfloat16) and out.dtype == torch.float32
    out.square().mean().backward()
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    plain = model(x, t, y)
    assert 0 < (out - plain).abs().max() < 0.03 * plain.abs().max()


def test_autocast_leaves_the_timestep_embedding_bit_for_bit():
    """Of a timestep of 999, bfloat16 would keep eight bits."""
    model = small_model()
    _, t, _ = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.t_embedder(t), small_model().t_embedder(t))


@pytest.mark.parametrize("flags, tolerance", [
    (["--precision", "bf16"], 0.02), (["--precision", "fp32"], 0), (["--fused-adamw"], 1e-4),
    (["--attention", "math"], 1e-4), (["--grad-checkpointing", 0.5], 0)])
def test_losses_of_two_hundred_steps_agree(run_ok, tmp_path, flags, tolerance):
    for name, extra in (("plain", []), ("fast", flags)):
        run_ok("train", *RUN, "--depth", 2, "--max-steps", 200, *extra, "--results-dir", tmp_path / name)
    plain, fast = scalars(tmp_path / "plain"), scalars(tmp_path / "fast")
    assert len(plain) == 200 and max(abs(plain[step] - fast[step]) for step in plain) <= tolerance
    one, two = stored(tmp_path / "plain", 200), stored(tmp_path / "fast", 200)
    for part in ("model", "ema"):
        assert {name: (weight.shape, weight.dtype) for name, weight in one[part].items()} == {
            name: (weight.shape, weight.dtype) for name, weight in two[part].items()}
    assert (differences(one, two) == []) == (tolerance == 0)


def test_a_resume_in_another_precision_must_be_allowed(run_ok, run_error, tmp_path):
    run_ok("train", *RUN, "--max-steps", 1, "--results-dir", tmp_path)
    err = run_error("train", *RUN, "--max-steps", 2, "--precision", "bf16", "--resume", "auto",
                    "--results-dir", tmp_path)
    assert "--precision" in err and "bf16" in err and "tf32" in err
    run_ok("train", *RUN, "--max-steps", 2, "--attention", "math", "--fused-adamw", "--grad-checkpointing",
           "--resume", "auto", "--results-dir", tmp_path)


@pytest.mark.parametrize("share, blocks", [(0.0, []), (0.5, [1, 3]), (1.0, [0, 1, 2, 3]), (0.25, [3])])
def test_checkpointed_blocks_are_evenly_spaced_and_gradients_equal(share, blocks):
    x, t, y = inputs(small_model(), n=4)
    grads = []
    for checkpointed in (0.0, share):
        model = small_model(depth=4).train()
        model.checkpointed, calls = checkpointed, collections.Counter()
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.update([i]))
        model(x, t, y, torch.zeros(4)).square().mean().backward()
        grads.append([weight.grad for weight in model.parameters() if weight.requires_grad])
    assert [i for i in range(4) if calls[i] == 2] == blocks
    assert all(torch.equal(one, two) for one, two in zip(*grads))
    model.eval()(x, t, y)
    assert calls.total() == 4 + len(blocks) + 4


def test_a_kernel_that_torch_lacks_is_an_error():
    model = small_model()
    x, t, y = inputs(model)
    plain = model(x, t, y)
    with torch.no_grad():
        torch.testing.assert_close(ComputeConfig(attention="flash").wrap(model)(x, t, y), plain, rtol=1e-4, atol=1e-5)
    ComputeConfig(attention="flash").check(CPU)
    with raises_argument(attention="cudnn"):
        ComputeConfig(attention="cudnn").check(CPU)


@pytest.mark.parametrize("precision, tolerance, conditioning", [
    ("tf32", 1e-4, "adaln-zero"), ("bf16", 0.03, "adaln-zero"), ("tf32", 1e-4, "cross-attention")])
def test_math_attention_computes_the_same_without_torchs_kernels(monkeypatch, precision, tolerance, conditioning):
    x, t, y = inputs(small_model(), n=4)
    results = []
    for config in (DEFAULT_COMPUTE, ComputeConfig(precision, attention="math")):
        model = small_model(conditioning=conditioning).train()
        config.prepare(model)
        if config != DEFAULT_COMPUTE:
            monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        out = config.wrap(model)(x, t, y, torch.zeros(4))
        out.square().mean().backward()
        results.append([out, model.blocks[0].attn.qkv.weight.grad])
    for plain, math in zip(*results):
        assert 0 < (plain - math).abs().max() < tolerance * plain.abs().max()


def test_the_kernel_is_the_one_of_the_flag(monkeypatch):
    seen = []
    monkeypatch.setattr(compute, "sdpa_kernel", lambda kernel: seen.append(kernel) or torch.no_grad())
    ComputeConfig(attention="efficient").wrap(model := small_model())(*inputs(model))
    assert seen == [SDPBackend.EFFICIENT_ATTENTION]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_rounded_weights_give_the_results_of_autocast(conditioning):
    model = small_model(conditioning=conditioning)
    x, t, y = inputs(model)
    config = ComputeConfig("bf16")
    rounded = Bf16InferenceModel(model, config)
    for change in (0.0, 0.1):
        for weight in model.parameters():
            weight.data += change
        assert torch.equal(config.wrap(rounded())(x, t, y), config.wrap(model)(x, t, y))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert rounded.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert rounded.model.t_embedder.mlp[0].weight.dtype == torch.float32


needs_compiler = pytest.mark.skipif(find_compiler_error(CPU) is not None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("depth, steps", [(2, 200), (9, 4)])
def test_compiled_training_gives_the_same_losses_and_names(depth, steps):
    """One graph serves all blocks: torch gives up at more than eight."""
    losses, names = [], []
    diffusion = create_diffusion("")
    with Recompilations() as seen:
        for is_compiled in (False, True):
            model = small_model(depth=depth).train()
            names.append(list(model.state_dict()))
            if is_compiled:
                ComputeConfig(compile=True).prepare(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            rows = []
            for step in range(steps):
                torch.manual_seed(step)
                x, t, y = inputs(model, n=4)
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
def test_compiled_sampling_gives_the_same_samples():
    def samples(compute):
        model = small_model(depth=1)
        pipeline = build_pipeline(model, IdentityAutoencoder(4), 4, cfg_scale=4.0, compute=compute)
        return [pipeline(dict(y=torch.arange(count)), PerSampleRNG(0, range(count), CPU)) for count in (5, 3)]

    plain = samples(DEFAULT_COMPUTE)
    with Recompilations() as seen:
        fast = samples(ComputeConfig(compile=True))
        assert seen.graphs == 1 and seen.breaks == 0
    for one, two in zip(plain, fast):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3 * one.abs().max().item())
    assert torch.equal(plain[0][:3], plain[1]) or torch.allclose(plain[0][:3], plain[1], atol=1e-4)


def test_without_a_compiler_a_warning_is_given(run_ok, tmp_path, monkeypatch):
    def broken(*args, **more):
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    out = run_ok("train", *RUN, "--max-steps", 2, "--compile", "--results-dir", tmp_path)
    assert "WARNING: --compile: there is no working compiler here (no C++ compiler found)" in out


@pytest.mark.parametrize("has_bf16", [False, True])
def test_fast_chooses_by_device_and_explicit_flags_win(run_ok, tmp_path, monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=has_bf16), raising=False)
    precision = "bf16" if has_bf16 else "tf32"
    assert fastest_config(CPU) == ComputeConfig(precision, compile=True, attention="math")
    out = run_ok("train", *DIGITS, "--fast", "--no-compile", "--max-steps", 1, "--results-dir", tmp_path)
    assert f"--fast: --precision {precision} --no-compile --attention math --fused-adamw" in out
    args = stored(tmp_path, 1)["args"]
    assert (args["precision"], args["compile"], args["fused_adamw"]) == (precision, False, True)


def test_sampling_commands_take_the_compute_flags(run_ok, tmp_path):
    run_ok("train", *DIGITS, "--max-steps", 1, "--results-dir", tmp_path)
    path = next(tmp_path.glob("*/checkpoints/0000001.pt"))
    few = ["--ckpt", path, "--num-sampling-steps", "ddim2", "--precision", "bf16"]
    assert '"precision": "bf16"' in run_ok("sample", *few, "--output", tmp_path / "x.png")
    run_ok("sample_ddp", *few, "--num-fid-samples", 3, "--sample-dir", tmp_path / "set")
    assert len(list((tmp_path / "set").glob("*-bf16.npz"))) == 1


def test_cuda_graphs_need_a_gpu(run_error, tmp_path):
    err = run_error("train", *RUN, "--max-steps", 1, "--cuda-graphs", "--results-dir", tmp_path)
    assert "--cuda-graphs" in err and "cpu" in err


def test_a_model_that_gets_its_weights_later_is_not_copied():
    """Under FSDP the average to sample from is gathered only for a while."""
    model = small_model()
    weights = model.state_dict()
    pipeline = build_pipeline(model.to("meta"), IdentityAutoencoder(4), 2, cfg_scale=1.0, compute=ComputeConfig("bf16"))
    model.to_empty(device="cpu").load_state_dict(weights)
    cond = dict(y=torch.arange(3))
    samples = pipeline(cond, PerSampleRNG(0, range(3), CPU))
    plain = build_pipeline(model, IdentityAutoencoder(4), 2, cfg_scale=1.0, compute=ComputeConfig("bf16"))
    assert all(one is two for one, two in zip(pipeline.network().parameters(), model.parameters(), strict=True))
    assert torch.equal(samples, plain(cond, PerSampleRNG(0, range(3), CPU)))
