"""Autoencoders: between pixels and the latents that the DiT works on."""
