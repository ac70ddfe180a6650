"""The paper's studies at the largest scale that a machine allows: `python -m experiments.block_types` and others.

Each study is a command that continues after a kill; docs/experiments.md lists them with their results.
"""
