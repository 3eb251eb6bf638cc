"""Print a hash of what each family trains and draws, to show that a change left both as they were.

Run it before and after the change, on the same machine, and compare what it prints:

    PYTHONPATH=old/src python scripts/training_hashes.py > before.txt
    PYTHONPATH=new/src python scripts/training_hashes.py > after.txt
    diff before.txt after.txt

Every row trains two epochs on a CPU in float32 with one thread, and draws (or reconstructs) three
images: name of the model, dimensions, hash of the weights, hash of the voxels. It uses nothing of
the package but its command line. Names on the command line choose rows; without any, all run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import nibabel
import numpy as np
import torch
from safetensors.torch import load_file

UNET = {"channels": [8, 8], "num_res_blocks": 1, "attention_from": 1, "num_norm_groups": 2}
GAN = {"adversarial_weight": 0.1, "adversarial_from_step": 2, "discriminator_channels": 8}
KL = {
    "name": "autoencoder_kl", "channels": [8, 8], "latent_channels": 2, "num_norm_groups": 2,
    "optimizer": {"lr": 1e-3},
}  # fmt: skip
VQ = {
    "name": "vqvae", "channels": [8, 8], "num_res_layers": 1, "num_embeddings": 8,
    "embedding_dim": 4, "optimizer": {"lr": 1e-3},
}  # fmt: skip
DDPM = {"name": "ddpm", **UNET, "num_sampling_steps": 3}
FLOW = {"name": "rectified_flow", **UNET, "num_sampling_steps": 3}
LATENT = {"name": "latent_diffusion", **UNET, "first_stage": "autoencoder_kl"}
STYLE = {"name": "stylegan", "channels": [8, 8], "latent_dim": 8, "num_mapping_layers": 2}
# Every family as its `tiny()` has it, then what further code paths need.
MODELS: dict[str, dict[str, Any]] = {
    "autoencoder_kl": KL,
    "vqvae": VQ,
    "code_prior": {
        "name": "code_prior", "dim": 8, "num_layers": 1, "num_heads": 2, "temperature": 0.1,
        "first_stage": "vqvae",
    },
    "dcgan": {
        "name": "dcgan", "latent_dim": 8, "channels": [8, 8], "discriminator_channels": [8, 8],
    },
    "ddpm": DDPM,
    "latent_diffusion": {**LATENT, "objective": {"name": "flow", "num_sampling_steps": 3}},
    "rectified_flow": FLOW,
    "stylegan": STYLE,
    "autoencoder_kl/adversarial": {**KL, **GAN, "spectral_weight": 0.1, "attention_from": 1},
    "autoencoder_kl/tiled": {**KL, "decode_voxels": 100},
    "vqvae/adversarial": {**VQ, **GAN, "discriminator_norm": "batch"},
    "code_prior/guided": {
        "name": "code_prior", "dim": 8, "num_layers": 1, "num_heads": 2, "first_stage": "vqvae",
        "guidance": 2, "top_k": 3,
    },
    "dcgan/spectral": {
        "name": "dcgan", "latent_dim": 8, "channels": [8, 8], "discriminator_channels": [8, 8],
        "norm": "group", "discriminator_norm": "none", "spectral_norm": True,
        "adversarial_loss": "hinge",
    },
    "ddpm/ddim": {**DDPM, "sampler": "ddim", "prediction": "epsilon", "min_snr_gamma": 5},
    "ddpm/learned": {
        **DDPM, "sampler": "ddpm", "num_train_steps": 5, "num_sampling_steps": 5,
        "variance": "learned", "guidance": 2, "schedule": "linear", "prediction": "x_0",
    },
    "latent_diffusion/diffusion": {
        **LATENT, "objective": {"name": "diffusion", "num_sampling_steps": 3},
    },
    "rectified_flow/euler": {**FLOW, "sampler": "euler", "guidance": 2},
    "rectified_flow/heun": {**FLOW, "sampler": "heun"},
    "stylegan/growing": {
        **STYLE, "progressive": True, "stage_epochs": 1, "path_length_weight": 2,
        "path_length_every": 2, "r1_every": 2, "truncation": 0.7,
    },
}  # fmt: skip
CONDITIONAL = ("code_prior", "dcgan", "ddpm", "latent_diffusion", "rectified_flow", "stylegan")


def write_phantoms(folder: Path, rank: int, num: int = 12) -> Path:
    """Boxes on noise, 16 voxels a side, as NIfTI, with a class and a number each."""
    folder.mkdir(parents=True)
    rows = ["SubjectID,Channel_0,Label,Age"]
    for index in range(num):
        random = np.random.default_rng(index)
        image = random.normal(30, 5, (16,) * rank)
        low, side = random.integers(2, 6), random.integers(4, 8)
        image[(slice(low, low + side),) * rank] += 100 + 40 * (index % 3)
        voxels = image.astype(np.float32).reshape(16, 16, -1)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / f"{index}.nii.gz")
        rows.append(f"s{index},{index}.nii.gz,{index % 3},{20 + 3 * index}")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return manifest


def run(*words: object) -> None:
    """Run a command of synthcube in this process; what it prints is shown where it fails."""
    printed = io.StringIO()
    sys.argv = ["synthcube", *map(str, words)]
    status: object = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_module("synthcube", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
    if status not in (0, None):
        sys.exit(f"{printed.getvalue()}\nsynthcube {' '.join(map(str, words))}: exit code {status}")


def digest(arrays: dict[str, np.ndarray]) -> str:
    """The first 16 digits of a SHA-256 over names and values, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {values.dtype} {values.shape}\n".encode())
        total.update(values.tobytes())
    return total.hexdigest()[:16]


def train(folder: Path, row: str, rank: int, data: Path) -> Path:
    """Train one model, unless it is trained already; returns its run."""
    out = folder / f"{row.replace('/', '-')}_{rank}d"
    if out.exists():
        return out
    model = dict(MODELS[row])
    if "first_stage" in model:
        model["first_stage"] = str(train(folder, model["first_stage"], rank, data))
    section: dict[str, Any] = {"size": [16] * rank, "validation_fraction": 0.25}
    if model["name"] in CONDITIONAL:
        section["conditions"] = {"Label": "class", "Age": "number"}
    config = {
        "seed": 7,
        "model": model,
        "data": section,
        "training": {"max_epochs": 2, "batch_size": 4, "sample_every_n_epochs": 0},
        "compute": {"accelerator": "cpu", "precision": "32", "deterministic": True},
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    run("train", "-c", path, "-d", data, "-o", out)
    return out


def draw(model: Path, data: Path, reconstructs: bool) -> dict[str, np.ndarray]:
    """The voxels of three images by file name."""
    out = model.with_name(f"{model.name}_images")
    if reconstructs:
        three = data.with_name("three.csv")
        three.write_text("".join(data.read_text().splitlines(keepends=True)[:4]))
        run("infer", "-m", model, "-o", out, "-d", three)
    else:
        run("infer", "-m", model, "-o", out, "-n", 3, "--seed", 5)
    paths = sorted((out / "images").iterdir())
    return {path.name: np.asanyarray(nibabel.load(path).dataobj) for path in paths}


def main(rows: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank in (2, 3):
            data = write_phantoms(folder / f"data_{rank}d", rank)
            for row in rows or MODELS:
                model = train(folder, row, rank, data)
                weights = model / "artifact" / "weights.safetensors"
                tensors = {key: value.numpy() for key, value in load_file(weights).items()}
                images = draw(model, data, MODELS[row]["name"] in ("autoencoder_kl", "vqvae"))
                print(f"{row:28} {rank}D  {digest(tensors)}  {digest(images)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
