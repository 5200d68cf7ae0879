"""What is read: images from folders, latents from the cache, and the order of reading."""
