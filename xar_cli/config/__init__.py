"""The one config schema, and the recipes written in it."""

from xar_cli.config.recipes import (
    check_new_run,
    dump_config,
    list_recipes,
    load_config_file,
    load_recipe,
    published_result,
)
from xar_cli.config.schema import Config

__all__ = [
    "Config", "check_new_run", "dump_config", "list_recipes", "load_config_file", "load_recipe", "published_result",
]  # fmt: skip
