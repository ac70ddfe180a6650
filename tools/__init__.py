"""Smaller commands: `python -m tools.plan` and others."""
