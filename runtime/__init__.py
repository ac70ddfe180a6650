"""What touches files, devices and processes: data, latents, checkpoints, generation. Knows nothing of the commands."""
