"""The paper's studies again, at the largest scale that a machine allows. Each is one command, and goes on where it was.

    python -m experiments.block_types       figure 5: four block types, and adaLN-single
    python -m experiments.scaling           figures 6 to 8: width and depth, patch size, multiply-adds
    python -m experiments.sampling_steps    figure 10: compute of sampling against compute of the network
    python -m experiments.guidance          guidance: its scale, its channels, an interval of timesteps
    python -m experiments.averages          the decay of the weights' moving average
    python -m experiments.variance          learned against fixed variances in few steps
    python -m experiments.report            docs/experiments.md and its pictures again, of the results that are there
"""
