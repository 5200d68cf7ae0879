"""The xAR network: entities, positions, attention and the transformer itself."""

from xar_cli.model.attention import KVCache
from xar_cli.model.entities import Grouping, build_grouping
from xar_cli.model.transformer import XAR

__all__ = ["XAR", "Grouping", "KVCache", "build_grouping"]
