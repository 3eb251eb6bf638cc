"""The README of an exported model: a model card in the Hub's format."""

from __future__ import annotations

import yaml

from synthcube import __version__
from synthcube.artifact import PICTURE, Artifact


def model_card(trained: Artifact, *, has_picture: bool) -> str:
    """Markdown with the Hub's YAML header."""
    image, model = trained.image, trained.config["model"]
    header = {
        "library_name": "synthcube",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["medical", "medical-imaging", "synthcube", model["name"], f"{image.rank}d"],
    }
    size = " x ".join(map(str, image.size))
    spacing = " x ".join(f"{each:g}" for each in image.spacing_mm[: image.rank])
    ranges = "; ".join(f"{low:g} to {high:g}" for low, high in image.intensity_range)
    numbers = "\n".join(f"| {name} | {value:.6g} |" for name, value in trained.metrics.items())
    picture = f"![Images made by this model]({PICTURE})\n" if has_picture else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {model["name"]} trained with SynthCube {__version__}

For research only: not a medical device, not for diagnosis, and not shown to protect the privacy
of the people whose images it was trained on.

{picture}
| images | |
| --- | --- |
| size | {size} |
| channels | {image.channels} |
| voxel size (mm) | {spacing} |
| intensities | {ranges} |
| classes | {", ".join(image.labels) or "none"} |

| training | |
| --- | --- |
{numbers}

## Use

```
synthcube infer -m THIS_FOLDER -o images -n 16
```

`config.yaml` holds every setting, `artifact.json` the SHA-256 of every file.
"""
