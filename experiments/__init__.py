"""The paper's studies at the largest scale that a machine allows. Each is one command and continues after a kill.

    python -m experiments.block_types       figure 5: four block types, and adaLN-single
    python -m experiments.scaling           figures 6 to 8: width and depth, patch size, multiply-adds
    python -m experiments.sampling_steps    figure 10: compute of sampling against compute of the network
    python -m experiments.guidance          guidance: its scale, its channels, an interval of timesteps
    python -m experiments.ema_decay         the decay of the EMA
    python -m experiments.variance          learned against fixed variances in few steps
    python -m experiments.report            docs/experiments.md and its pictures from the stored results

Flags are those of experiments/runner.py; docs/experiments.md has the results.
"""
