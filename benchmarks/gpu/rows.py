"""All rows, in order of value: a GPU may be lent for minutes only."""
from benchmarks.gpu.row import Row

XL = "DiT-XL/2"
PARTS = {
    "correctness": "Correctness on the device",
    "training": "Training throughput",
    "profile": "Where the milliseconds go",
    "sampling": "Sampling",
    "options": "One option at a time",
    "memory": "Memory, predicted and measured",
    "loading": "Loading",
}


# These come first, whatever their part: the first minutes on a GPU decide on the targets.
ESSENTIAL = (
    "golden vectors in float32", "a training step never waits", "XL/2 published recipe, TF32, batch 128",
    "XL/2 --fast, batch 128", "XL/2 published loop, TF32, 250 steps, batch 32", "XL/2 --fast, 250 steps, batch 32",
    "XL/2 --fast, batch 256", "a training step of XL/2 --fast, batch 128", "--fast against plain, 200 steps")


def all_rows():
    """List all rows: the essential ones, then part by part."""
    rows = [*_correctness(), *_training(), *_profile(), *_sampling(), *_options(), *_memory(), *_loading()]
    by_name = {row.name: row for row in rows}
    return [by_name[name] for name in ESSENTIAL] + [row for row in rows if row.name not in ESSENTIAL]


def _rows(part, function, rows):
    """Build the rows {name: (seconds, settings)} of a function."""
    return [Row(name=name, part=part, function=f"benchmarks.gpu.{function}", settings=settings, seconds=seconds)
            for name, (seconds, settings) in rows.items()]


def _correctness():
    graphs = dict(cuda_graphs=True)
    checks = [("golden vectors in float32", "check_golden_vectors", 15, {}),
              ("a training step never waits", "check_training_never_waits", 40, {}),
              ("a sampling step never waits", "check_sampling_never_waits", 30, {}),
              ("--fast against plain, 200 steps", "compare_losses", 45, {}),
              ("sampling with --fast against plain", "compare_samples", 30, {}),
              ("a resumed run", "check_resume", 45, {}),
              ("one process with NCCL", "check_one_process_group", 10, {}),
              ("--cache-on-device against files", "check_cache_on_device", 10, {}),
              ("--cuda-graphs against plain, 200 steps", "compare_losses", 45, dict(options=graphs)),
              ("sampling with --cuda-graphs against plain", "compare_samples", 30, dict(options=graphs))]
    return [row for name, function, seconds, settings in checks
            for row in _rows("correctness", f"correctness:{function}", {name: (seconds, settings)})]


def _training():
    plain = dict(base="plain", fused=False)
    return _rows("training", "training:measure_throughput", {
        "XL/2 published recipe, TF32, batch 128": (35, dict(batch=128, base="published")),
        "XL/2 --fast, batch 128": (60, dict(batch=128)),
        "XL/2 --fast, batch 256": (60, dict(batch=256)),
        "XL/2 --fast, batch 64": (50, dict(batch=64)),
        "XL/2 --fast, batch 32": (45, dict(batch=32)),
        "XL/2 no flags, batch 128": (35, dict(batch=128, **plain)),
        "XL/2 + --precision bf16, batch 128": (20, dict(batch=128, precision="bf16", **plain)),
        "XL/2 + --compile, batch 128": (60, dict(batch=128, precision="bf16", compile=True, **plain)),
        "XL/2 published recipe, TF32, batch 64": (30, dict(batch=64, base="published")),
        "B/2 published recipe, TF32, batch 256": (20, dict(model="DiT-B/2", base="published")),
        "B/2 --fast, batch 256": (40, dict(model="DiT-B/2")),
        "S/2 published recipe, TF32, batch 256": (15, dict(model="DiT-S/2", base="published")),
        "S/2 --fast, batch 256": (35, dict(model="DiT-S/2"))})


def _profile():
    return (_rows("profile", "profile:profile_training", {
        "a training step of XL/2 --fast, batch 128": (60, dict(model=XL, batch=128)),
        "a training step of S/2 --fast, batch 256": (50, dict(model="DiT-S/2"))})
        + _rows("profile", "profile:profile_sampling", {
            "a sampling step of XL/2 --fast, batch 32": (60, dict(model=XL, batch=32))}))


def _sampling():
    rows = {
        "published loop, TF32, 250 steps": (50, dict(base="published", measured_steps="10")),
        "--fast, 250 steps": (60, dict(measured_steps="50")),
        "--fast --cuda-graphs, 250 steps": (120, dict(measured_steps="50", cuda_graphs=True)),
        "no flags, 250 steps": (40, dict(base="plain", measured_steps="10")),
        "--fast, 250 steps in full": (120, {}),
        "--fast, ddim50": (60, dict(steps="ddim50")),
        "--fast, 250 steps, --cfg-interval 200 700": (90, dict(cfg_interval=(200, 700)))}
    rows = {f"XL/2 {name}, batch 32": row for name, row in rows.items()}
    return (_rows("sampling", "sampling:measure_sampling", rows)
            + _rows("sampling", "sampling:measure_decoder", {"VAE decoder, 256x256, batch 32": (30, {})}))


def _options():
    modes = {"max-autotune": dict(max_autotune=True)}
    changes = {f"--attention {name}": dict(attention=name) for name in ("flash", "cudnn", "efficient", "math")}
    changes |= {"--cuda-graphs": dict(cuda_graphs=True)}  # torch.compile's mode reduce-overhead
    changes |= {f"compile mode {name}": dict(inductor=options) for name, options in modes.items()}
    changes |= {"the whole network in one graph": dict(whole=True), "foreach AdamW": dict(fused=False)}
    changes |= {f"--grad-checkpointing {share}": dict(checkpointed=share) for share in (0.25, 0.5, 1.0)}
    slow = {"compile mode max-autotune": 180, "the whole network in one graph": 120, "--cuda-graphs": 120}
    rows = {f"XL/2 --fast, batch 128, {name}": (slow.get(name, 60), dict(batch=128, **options))
            for name, options in changes.items()}
    return (_rows("options", "training:measure_throughput", rows)
            + _rows("options", "training:measure_optimizer", {
                f"AdamW of XL/2, {kind}": (8, dict(kind=kind)) for kind in ("fused", "foreach", "for-loop")})
            + _rows("options", "training:measure_ema", {
                f"EMA of XL/2, the {who} decides": (8, dict(decided=who)) for who in ("host", "device")}))


def _memory():
    settings = {
        "XL/2 bf16, batch 64": dict(batch=64),
        "XL/2 TF32, batch 64": dict(batch=64, precision="tf32"),
        "XL/2 bf16, half of the blocks checkpointed, batch 64": dict(batch=64, checkpointed=0.5),
        "XL/2 bf16, all blocks checkpointed, batch 256": dict(batch=256, checkpointed=1.0),
        "XL/2 bf16, foreach AdamW, batch 64": dict(batch=64, fused=False),
        "XL/2 bf16, compiled, batch 64": dict(batch=64, compile=True)}
    rows = {name: (90 if "compiled" in name else 30, options) for name, options in settings.items()}
    return (_rows("memory", "training:measure_memory", rows)
            + _rows("memory", "training:find_largest_batch", {
                "largest batch of XL/2 bf16": (60, {}),
                "largest batch of XL/2 bf16, all blocks checkpointed": (90, dict(checkpointed=1.0, stride=64))}))


def _loading():
    return _rows("loading", "loading:measure_loading", {
        "latent cache, 8 workers": (30, dict(source="cache")),
        "JPEG of 500x375, 8 workers": (40, dict(source="images")),
        "JPEG of 500x375, 16 workers": (40, dict(source="images", num_workers=16)),
        "latent cache, 8 workers, cold": (30, dict(source="cache", cold=True)),
        "latent cache on the device": (30, dict(source="cache on the device"))})
