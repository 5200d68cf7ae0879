"""The stage that turns images into a latent cache: stage.py reads as the story, pipeline.py is the flow of
work.
"""

from xar_cli.cache.plan import CacheSettings
from xar_cli.cache.stage import CacheSummary, cache_latents

__all__ = ["CacheSettings", "CacheSummary", "cache_latents"]
