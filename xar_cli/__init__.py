"""xAR: next-X autoregressive image generation, from a folder of images to a reported FID."""

__version__ = "0.1.0"
