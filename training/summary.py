"""The first lines of a run's log: what is trained, on what, for how long, and what may not be as it should."""
import os

from common import distributed
from common.files import format_bytes
from common.flops import count_parameters
from common.resources import free_disk
from data.dataset import describe_dataset
from training.run_dir import list_run_dirs


def opening_lines(flags, args, run_dir, model, dataset, batches, resumed):
    """Yield the first lines of log.txt."""
    yield f"Experiment directory: {run_dir}" if resumed else f"Experiment directory created at {run_dir}"
    yield f"{distributed.world_size()} process(es) on {distributed.device().type}, " + ", ".join(
        f"{name}={value}" for name, value in args.items())
    yield f"DiT Parameters: {count_parameters(model):,}"
    num_classes = len(dataset.class_names)
    source = flags.features_path or flags.data_path
    yield f"Dataset contains {len(dataset):,} images in {num_classes} classes ({source})"
    yield from describe_dataset(dataset)
    if num_classes < flags.num_classes:
        yield (f"WARNING: --num-classes is {flags.num_classes}: the classes {num_classes} .. {flags.num_classes - 1} "
               "have no image and will not be learned")
    checkpoint_bytes, free = 4 * (3 + len(flags.ema_decay)) * count_parameters(model), free_disk(run_dir)
    if checkpoint_bytes > free:
        yield (f"WARNING: a checkpoint takes {format_bytes(checkpoint_bytes)}, the disk of {run_dir} has "
               f"{format_bytes(free)} free")
    if flags.class_dropout_prob == 1:
        yield "WARNING: --class-dropout-prob 1 drops every label: no class will be learned. The paper's value is 0.1"
    if resumed:
        yield f"Resuming from {resumed} at step {batches.start_step}"
    elif flags.resume:
        others = [os.path.basename(path) for path in list_run_dirs(flags.results_dir) if path != run_dir]
        yield (f"WARNING: --resume auto: no checkpoint of {flags.model} in {flags.results_dir}, starting from the "
               "beginning" + (f" (of others: {', '.join(others[-3:])})" if others else ""))


def plan_line(flags, batches):
    """Return the log line about the steps that follow."""
    limit = "--max-steps" if batches.end_step == flags.max_steps else f"--epochs {flags.epochs}"
    if batches.start_step < batches.end_step:
        return f"Training for {len(batches)} steps, to step {batches.end_step} ({limit})"
    return f"Nothing to do: {batches.start_step} steps are done, --epochs and --max-steps ask for {batches.end_step}"
