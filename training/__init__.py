"""Training: one step, its state on disk, its faults, and what is logged of it."""
