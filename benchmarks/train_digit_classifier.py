"""Train the classifier of the `digits` protocol, on the real train part alone, and write it into the package.

    python benchmarks/train_digit_classifier.py

About a minute on two cores. Prints the held-out accuracy and records it in the file. The held-out part picks
nothing: the number of epochs is fixed, and the last weights are kept.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import xar_cli.evaluate.digits as digits_protocol
from xar_cli.data.digits import Digits, split_digits

EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY, LABEL_SMOOTHING = 120, 125, 4e-3, 0.02, 0.05
MAX_TURN, MAX_SCALE, MAX_SHIFT = math.radians(12), 0.1, 1.0  # shift in pixels
OUT = Path(digits_protocol.__file__).parent / digits_protocol.WEIGHTS_FILE


def as_tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(digits.images)[:, None].float() / 127.5 - 1, torch.from_numpy(digits.labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A small random turn, scale and shift of each image; what comes in from outside is paper."""
    count, size = len(images), images.shape[-1]
    draw = lambda: torch.rand(count, generator=generator) * 2 - 1  # noqa: E731
    angle, scale = draw() * MAX_TURN, 1 + draw() * MAX_SCALE
    shift_x, shift_y = draw() * MAX_SHIFT * 2 / size, draw() * MAX_SHIFT * 2 / size
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), shift_x], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), shift_y], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def accuracy(net: digits_protocol.DigitNet, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (net.eval()(images)[1].argmax(1) == labels).float().mean().item()


def train(seed: int) -> tuple[digits_protocol.DigitNet, float, float]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (images, labels), (heldout_images, heldout_labels) = (as_tensors(part) for part in split_digits())
    net = digits_protocol.DigitNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for epoch in range(EPOCHS):
        net.train()
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            _, logits = net(augment(images[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    return net, accuracy(net, images, labels), accuracy(net, heldout_images, heldout_labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    net, train_accuracy, heldout_accuracy = train(arguments.seed)
    metadata = {
        "what": "classifier of 8 x 8 handwritten digits, trained on real images only",
        "data": "UCI Optical Recognition of Handwritten Digits, test part; 1500 train, 297 held out",
        "script": "benchmarks/train_digit_classifier.py",
        "seed": str(arguments.seed),
        "train_accuracy": f"{train_accuracy:.4f}",
        "heldout_accuracy": f"{heldout_accuracy:.4f}",
        "torch": torch.__version__,
    }
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, arguments.out, metadata)
    print(f"train accuracy {train_accuracy:.4f}, held-out accuracy {heldout_accuracy:.4f}")
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
