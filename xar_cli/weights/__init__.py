"""Published weights in, ours out. The whole of what other parts call:

    model, weights = load_weights(source, config_or_None, ema=True, device=device, dtype=torch.float32)

`source` is a file, a run or checkpoint folder, or `hf://owner/repo/file[@revision]`; `model` is an `XAR` in
eval mode on the device; `weights` is a `WeightsFile` with `.config` (the recipe that was given, stored or
found by shape), `.kind`, `.epoch`, `.step`, `.class_names` and `.sha256` (of the file; reads it when first
asked). `open_weights` gives the same `weights` without loading the tensors (of a checkpoint it reads
the averages, or the raw weights, once for their checksums). Every fault is a UserError, and nothing in a file can run.
"""

from xar_cli.weights.export import export_weights
from xar_cli.weights.files import WeightsFile, load_weights, open_weights
from xar_cli.weights.published import from_published, to_published

__all__ = ["WeightsFile", "export_weights", "from_published", "load_weights", "open_weights", "to_published"]
