"""The sample stage: from a trained network to a folder of images with a manifest."""
