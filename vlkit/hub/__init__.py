"""Checkpoints: published names and ours, weights streamed from safetensors, folders published whole or not at all."""
