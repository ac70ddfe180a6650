"""tools.plan: its numbers are the paper's, what torch counts, and what real steps and caches take."""
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

import models
from autoencoder.vae import IdentityAutoencoder, LatentScaling
from common.compute import ComputeConfig
from common.flops import peak_flops
from common.seeding import BatchRNG
from data.latent_cache import manifest
from data.latent_cache.manifest import cache_bytes, new_manifest
from data.latent_cache.writer import LatentCacheWriter
from diffusion import create_diffusion
from diffusion.timestep_sampler import UniformSampler
from tools import plan
from tools.memory import ACTIVATION, _trace_step, estimate_step_memory
from training.ema import EMA
from training.nan_guard import NonFiniteGuard
from training.train_step import TrainStep

TINY = ["--model", "DiT-S/2", "--depth", 1, "--hidden-size", 32, "--num-heads", 2, "--image-size", 64]
# Table 4 of the paper: Gflops and millions of parameters.
PAPER = {"DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33),
         "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130), "DiT-B/2": (23.01, 130),
         "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
         "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675), "DiT-XL/2": (118.64, 675)}


@pytest.fixture
def planned(command):
    """planned("--flag", ...) -> what --json prints."""
    def run(*flags):
        status, out, err = command("tools.plan", *flags, "--json")
        assert status == 0, err
        return json.loads(out)
    return run


# ---------------------------------------------------------------- the network, time

def test_all_models_are_the_papers(planned, monkeypatch):
    monkeypatch.setattr(plan, "memory", lambda *_: None)
    rows = {row["model"]: row for row in planned("--model", "all")["models"]}
    assert set(rows) == set(PAPER)
    for name, (gflops, millions) in PAPER.items():
        row = rows[name]
        assert row["gflops"] == pytest.approx(gflops, rel=1e-3, abs=0.0105)
        assert round(row["parameters"] / 1e6) == millions
        assert row["tokens"] == (32 // int(name[-1]))**2 and row["latents"] == [4, 32, 32]
    assert rows["DiT-XL/2"]["parameters"] == 674_834_720
    assert rows["DiT-XL/2"]["step_flops"] == pytest.approx(256 * 711.8e9, rel=1e-3)


def test_hours_follow_from_flops_and_rate(planned, monkeypatch):
    """The rate is that of the precision."""
    monkeypatch.setattr(plan, "memory", lambda *_: None)
    flags = [*TINY, "--gpu", "a100", "--gpus", 8, "--mfu", 0.5, "--steps", 1000]
    for precision, rate in (("tf32", 156e12), ("bf16", 312e12), ("fp32", 19.5e12)):
        (row,) = planned(*flags, "--precision", precision)["models"]
        assert row["step_flops"] == pytest.approx(256 * 6 * row["gflops"] * 1e9)
        assert row["hours"] == {"1000": pytest.approx(1000 * row["step_flops"] / (0.5 * 8 * rate) / 3600)}


def test_peak_rates_are_found_by_device_name(monkeypatch):
    for name, tf32 in (("NVIDIA A100-SXM4-40GB", 156e12), ("NVIDIA A100 80GB PCIe", 156e12), ("NVIDIA H200", 494e12),
                       ("NVIDIA H100 80GB HBM3", 494e12), ("NVIDIA H100 PCIe", 378e12), ("NVIDIA H100 NVL", None),
                       ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops("cuda", "tf32") == tf32
    assert peak_flops("cpu", "tf32") is None


# ---------------------------------------------------------------- memory

def small_model():
    torch.manual_seed(0)
    return models.DiT(input_size=16, hidden_size=96, depth=2, num_heads=4, num_classes=10)


class RealStep:
    """Training steps of train.py without its data."""

    def __init__(self, model, device, batch, compute, checkpointed, num_microbatches):
        self.model, self.ema, self.batch, self.device = model.to(device).train(), EMA(model, 0.99), batch, device
        model.checkpointed = checkpointed
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0, foreach=True)
        diffusion = create_diffusion("")
        self.train_step = TrainStep(
            model, model, IdentityAutoencoder(model.in_channels), diffusion, UniformSampler(diffusion), self.optimizer,
            [self.ema], NonFiniteGuard(max_bad_steps=10), BatchRNG(0, batch, slice(0, batch), torch.device(device)),
            num_microbatches, compute=compute)

    def __call__(self, step):
        self.train_step(step, torch.zeros(self.batch, *self.model.sample_shape, device=self.device),
                        dict(y=torch.zeros(self.batch, dtype=torch.long, device=self.device)))


def peak_of(step, path):
    """The most bytes that torch's CPU allocator has given out during step(), beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        most = max(most, total)
    return most


def persistent_bytes(run):
    """What a run keeps, tensor by tensor."""
    def bytes_of(tensors):
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    moments = [state[name] for state in run.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return dict(weights=bytes_of(run.model.parameters()), optimizer=bytes_of(moments),
                gradients=bytes_of(weight for weight in run.model.parameters() if weight.requires_grad),
                ema=bytes_of(run.ema.model.parameters()), exchange=0)


@pytest.mark.parametrize("precision, checkpointed, num_microbatches", [
    ("fp32", 0.0, 1), ("fp32", 0.5, 1), ("fp32", 1.0, 1), ("fp32", 0.0, 2), ("bf16", 0.0, 1), ("bf16", 1.0, 1)])
def test_memory_is_that_of_a_real_step(tmp_path, precision, checkpointed, num_microbatches):
    """State to the byte; the peak of a second step, which finds the moments there, within 5 %."""
    compute, batch = ComputeConfig(precision), 16
    estimate = estimate_step_memory(small_model, compute, checkpointed, num_microbatches)
    run = RealStep(small_model(), "cpu", batch, compute, checkpointed, num_microbatches)
    run(0)
    assert estimate.persistent() == persistent_bytes(run)
    run.optimizer.zero_grad(set_to_none=True)
    peak = peak_of(lambda: run(1), tmp_path / "trace.json")
    kept = estimate.weights + estimate.optimizer + estimate.ema
    assert estimate.peak(batch // num_microbatches) - kept == pytest.approx(peak, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision, checkpointed", [("tf32", 0.0), ("bf16", 0.0), ("bf16", 1.0)])
def test_memory_is_that_of_a_gpu(precision, checkpointed):
    """The peak that the allocator tells, within 15 %: kernels use more inside, and torch rounds up."""
    compute, batch = ComputeConfig(precision), 64
    estimate = estimate_step_memory(models.DiT_models["DiT-B/2"], compute, checkpointed)
    run = RealStep(models.DiT_models["DiT-B/2"](), "cuda", batch, compute, checkpointed, num_microbatches=1)
    before = torch.cuda.memory_allocated() - sum(size for name, size in persistent_bytes(run).items())
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        run(step)
        run.optimizer.zero_grad(set_to_none=True)
    assert estimate.peak(batch) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


def test_largest_batch_is_the_largest():
    """It fits, one more does not; a batch that was not followed takes what the line says."""
    estimate = estimate_step_memory(small_model)
    for devices, fsdp in ((1, False), (8, False), (8, True)):
        memory = estimate.peak(100, devices, fsdp) + 1000
        assert estimate.largest_batch(memory, devices, fsdp) == 100
        assert estimate.peak(100, devices, fsdp) <= memory < estimate.peak(101, devices, fsdp)
    assert estimate.largest_batch(estimate.weights) == 0
    _sizes, backward, _ = _trace_step(small_model, 9, ComputeConfig("fp32"), 0.0, 1, False)
    assert estimate.activations(9) == backward[backward[:, 0] == ACTIVATION, 1].cumsum().max()


def test_fsdp_shards_and_ddp_replicates():
    """DDP holds what one GPU does, its gradients from the start; FSDP shares all, and gathers block by block."""
    estimate = estimate_step_memory(small_model, ComputeConfig("bf16"))
    alone, ddp, fsdp = estimate.persistent(), estimate.persistent(4), estimate.persistent(4, fsdp=True)
    assert ddp == alone and estimate.peak(100, 4) > estimate.peak(100)
    assert all(fsdp[name] == alone[name] // 4 for name in ("weights", "gradients", "optimizer", "ema"))
    block = sum(weight.nbytes for weight in small_model().blocks[0].parameters())
    outside = alone["weights"] - 2 * block
    assert fsdp["exchange"] == outside + 2 * block // 2 + 2 * block  # weights in bfloat16, gradients in float32
    assert estimate.activations(1) > estimate.activations(1, fsdp=True)  # autocast's copies of the weights


def test_fused_adamw_has_no_temporaries():
    peaks = [estimate_step_memory(small_model, fused=fused).peak(1) for fused in (False, True)]
    assert peaks[0] - peaks[1] == pytest.approx(estimate_step_memory(small_model).weights, rel=0.05)


# ---------------------------------------------------------------- the latent cache

@pytest.mark.parametrize("dtype, flips", [("fp16", True), ("fp16", False), ("fp32", True), ("bf16", True)])
def test_cache_bytes_are_those_of_a_real_one(tmp_path, monkeypatch, dtype, flips):
    """Written as extract_features.py writes it, in several files."""
    monkeypatch.setattr(manifest, "MAX_FILE_BYTES", 8_000)
    images = SimpleNamespace(labels=[0] * 11, paths=[f"{i}.png" for i in range(11)], class_names=["all"])
    autoencoder = SimpleNamespace(latent_scaling=LatentScaling(4, 8, 0.18215, 0.0), channels=4, stride=8, name="x",
                                  encoder_sha256="x")
    writer = LatentCacheWriter(str(tmp_path), new_manifest(images, "x", autoencoder, 64, flips, dtype, "fp32"))
    writer.prepare(images)
    writer.write(0, torch.zeros(11, 1 + flips, 8, 8, 8), [False] * 11)
    files = [path for path in tmp_path.glob("*.npy") if path.name != "progress.npy"]
    assert len(files) > 2
    assert cache_bytes(11, 1 + flips, 4, 8, dtype) == sum(os.path.getsize(path) for path in files)


def test_the_cache_of_imagenet_is_as_documented(planned, monkeypatch):
    """What docs/latents.md says."""
    monkeypatch.setattr(plan, "memory", lambda *_: None)
    for flags, size in ((["--image-size", 256], 42.0), (["--image-size", 512], 168.0), (["--no-flip"], 21.0)):
        (row,) = planned("--depth", 1, *flags)["models"]
        assert row["latent_cache"] / 1e9 == pytest.approx(size, rel=0.002)
    (row,) = planned("--depth", 1, "--vae", "none", "--image-size", 64)["models"]
    assert row["latent_cache"] is None and row["latents"] == [3, 64, 64]


# ---------------------------------------------------------------- the command

def test_the_page_names_the_hardware_and_both_kinds_of_memory(command):
    """Both ways of keeping activations, the GPU that it was asked for, the steps."""
    status, out, err = command("tools.plan", *TINY, "--gpus", 2, "--gpu", "h200", "--steps", 500,
                               "--grad-checkpointing", 0.5)
    assert status == 0, err
    assert "4x8x8, 16 tokens" in out and "2 x H200 141 GB by DDP, 128 at once on each, tf32" in out
    assert re.search(r"no checkpointing .* fits", out) and re.search(r"--grad-checkpointing 0.5 .* fits", out)
    assert re.search(r"\b500 steps 0\.0 hours", out) and "EMA" in out and "Latent cache of 1,281,167" in out


def test_the_largest_batch_fits(planned):
    flags = [*TINY, "--depth", 3, "--image-size", 128, "--gpu", "rtx4090", "--memory-share", 0.001]
    rows = planned(*flags)["models"][0]["memory"]
    assert [row["grad_checkpointing"] for row in rows] == [0, 1]
    assert not rows[0]["fits"] and 0 < rows[0]["largest_global_batch_size"] < 256
    assert rows[1]["activations"] < rows[0]["activations"]
    row = planned(*flags, "--global-batch-size", rows[0]["largest_global_batch_size"])["models"][0]["memory"][0]
    assert row["fits"] and row["at_most"] <= row["usable"]


def test_a_table_has_a_line_per_model(command, monkeypatch):
    """The real memory of two sizes, a line each."""
    monkeypatch.setattr(models, "DiT_models", {name: models.DiT_models[name] for name in ("DiT-S/8", "DiT-B/8")})
    status, out, err = command("tools.plan", "--model", "all", "--precision", "bf16", "--depth", 1)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["model", "DiT-S/8", "DiT-B/8"]


@pytest.mark.parametrize("flags, sentence", [
    (["--fsdp"], r"--fsdp, --gpus 1: "),
    (["--gpus", 3], r"--global-batch-size 256, --gpus 3, .* multiple of 3"),
    (["--gpus", 2, "--grad-accum-steps", 3], r"--gpus 2, --grad-accum-steps 3: .* multiple of 6"),
    (["--image-size", 100], r"--image-size 100: .* multiple of 8"),
    (["--patch-size", 3], r"--patch-size 3, --model DiT-XL/2, --image-size 256: .* patch_size 3"),
    (["--num-heads", 5], r"hidden_size 1152 is not a multiple of num_heads 5"),
    (["--depth", 10**9], r"--depth 1000000000: "),
    (["--gpu", "cpu"], r"argument --gpu: invalid choice: 'cpu'"),
    (["--mfu", 0], r"argument --mfu: 0 "),
    (["--mfu", 45], r"argument --mfu: 45 "),
    (["--vae", "mine"], r"argument --vae: mine .* ema, mse, none, .* 16x8"),
])
def test_mistakes_name_the_flags(command, flags, sentence):
    status, out, err = command("tools.plan", *flags)
    assert status == 2 and not out and re.search(sentence, err), err
