"""Options that several commands share, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

RecipeOption = Annotated[
    Optional[str], typer.Option("--recipe", "-r", help="Recipe name (`xar recipes list`) or a YAML file.")
]
SetOption = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Override one recipe value; may be repeated.")
]
RunOption = Annotated[Optional[Path], typer.Option("--run", help="Run folder that `xar train --out` wrote.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")]
TokenizerWeightsOption = Annotated[
    Optional[Path], typer.Option("--tokenizer-weights", help="kl16.ckpt, or the same weights as safetensors.")
]
