"""The readable names of the 1,000 ImageNet classes, by their WordNet ids (`n01440764` -> `tench`).

The ids are those of ILSVRC 2012, the names those that torchvision gives its classifiers; both stand in
imagenet_classes.txt.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources


@lru_cache(maxsize=1)
def imagenet_names() -> dict[str, str]:
    """Readable name of each of the 1,000 ids, in order of id."""
    text = resources.files("xar_cli.data").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return dict(line.split(" ", 1) for line in text.splitlines())


def class_title(name: str) -> str:
    """What people call a class: the readable name of an ImageNet id, any other name as it is."""
    return imagenet_names().get(name, name)
