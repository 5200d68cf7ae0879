"""The fixtures of tests/weight_files.py."""

from tests.weight_files import bare_file, published, recipe_file, run_folder, training_file

__all__ = ["bare_file", "published", "recipe_file", "run_folder", "training_file"]
