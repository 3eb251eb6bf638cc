"""Are generated pictures what they should be? A small classifier of real ones says.

    python -m bench.recognition --real MedNIST --made my-hands/images --as Hand
    python -m bench.recognition --real MedNIST --made my-images

The second takes what `synthcube infer` wrote of a conditional model, and its manifest says what was
asked for.

Trains a small classifier on one half of the real pictures of every class (folders in --real), then
prints the share of made pictures that it takes for the asked class, and the Frechet distance of its
features to the other half; beside both, what real pictures of that half get. A distance in these
features compares nothing but models judged by the same run of this program.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.metrics import FIDMetric
from PIL import Image
from torch import nn

Halves = list[torch.Tensor]  # all pictures of each class: even ones to train, odd ones to test


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recognition")
    parser.add_argument("--real", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--made", type=Path, required=True, help="folder of generated pictures")
    parser.add_argument("--as", dest="name", help="class they should be of")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    classes, halves, network = classifier(options.real, options.epochs)
    print(f"classifier: {sum(len(half[::2]) for half in halves)} real pictures of "
          f"{len(classes)} classes")  # fmt: skip
    if options.name:
        compare(network, classes.index(options.name), halves, pictures(options.made))
    else:
        compare_classes(network, classes, halves, options.made)


def classifier(
    real: Path, epochs: int = 4, side: int = 64
) -> tuple[list[str], Halves, nn.Sequential]:
    """The classes of a folder, their pictures of so many pixels, and a classifier of the even
    ones."""
    torch.manual_seed(0)
    classes = sorted(path.name for path in real.iterdir() if path.is_dir())
    halves = [pictures(real / name, side) for name in classes]
    images = torch.cat([half[::2] for half in halves])
    labels = torch.cat([torch.full((len(half[::2]),), i) for i, half in enumerate(halves)])
    return classes, halves, trained(images, labels, epochs)


def shares(
    classes: Sequence[str],
    halves: Halves,
    network: nn.Sequential,
    images: torch.Tensor,
    labels: Sequence[str],
) -> dict[str, tuple[float, float]]:
    """By class, which share of the images asked to be of it is taken for it, and of real ones."""
    taken = network(images).argmax(1)
    rates = {}
    for index, name in enumerate(classes):
        chosen = [place for place, label in enumerate(labels) if label == name]
        if chosen:
            real = (network(halves[index][1::2]).argmax(1) == index).float().mean().item()
            rates[name] = ((taken[chosen] == index).float().mean().item(), real)
    return rates


def recognised(real: Path, drawn: Path, side: int = 64) -> dict[str, float]:
    """Shares that a classifier of real images takes for the class asked for: mean and worst.

    Args:
        real: folder of class folders.
        drawn: what `synthcube infer` wrote of a conditional model.
    """
    images = pictures(drawn / "images", side)
    rates = shares(*classifier(real, side=side), images, asked_for(drawn))
    drawn_shares, real_shares = zip(*rates.values(), strict=True)
    return {
        "mean": float(np.mean(drawn_shares)), "worst": min(drawn_shares),
        "real_mean": float(np.mean(real_shares)), "real_worst": min(real_shares),
    }  # fmt: skip


def compare(network: nn.Sequential, wanted: int, halves: Halves, generated: torch.Tensor) -> None:
    """Print how pictures of one class fare beside real ones."""
    held_out = halves[wanted][1::2]
    number = min(len(generated), len(held_out) // 2)
    reference = features(network, held_out[number:])
    for title, group in (("real, held out", held_out[:number]), ("made", generated[:number])):
        share = (network(group).argmax(1) == wanted).float().mean().item()
        distance = float(FIDMetric()(features(network, group), reference))
        print(f"{title}: {number} pictures, {share:.1%} taken for that class, "
              f"Frechet distance {distance:.2f}")  # fmt: skip


def compare_classes(
    network: nn.Sequential, classes: list[str], halves: Halves, folder: Path
) -> None:
    """Print the share of each class that is taken for it, beside that of real pictures."""
    labels = asked_for(folder)
    rates = shares(classes, halves, network, pictures(folder / "images"), labels)
    for name, (share, real) in rates.items():
        number = labels.count(name)
        print(f"{name}: {number} made, {share:.1%} taken for it (real, held out: {real:.1%})")
    mean = np.mean([rates[label][0] for label in labels])
    print(f"all: {len(labels)} made, {mean:.1%} taken for the class asked for")


def asked_for(folder: Path) -> list[str]:
    """The class of each image that `synthcube infer` wrote, in the order of their names."""
    with (folder / "manifest.csv").open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["Channel_0"])
    return [row["Label"] for row in rows]


def pictures(folder: Path, side: int = 64) -> torch.Tensor:
    """(N, 1, side, side) in [-1, 1], in the order of their names."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpeg", ".jpg"))
    arrays = [np.asarray(Image.open(path).convert("L").resize((side, side))) for path in names]
    return torch.from_numpy(np.stack(arrays)).float()[:, None] / 127.5 - 1


def trained(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> nn.Sequential:
    """A classifier of four strided convolutions; its last layer but one gives the features."""
    layers: list[nn.Module] = []
    channels = [1, 16, 32, 64, 64]
    for before, after in itertools.pairwise(channels):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    head = nn.Linear(channels[-1], int(labels.max()) + 1)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def features(network: nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    return network[:-1](images)


if __name__ == "__main__":
    main()
