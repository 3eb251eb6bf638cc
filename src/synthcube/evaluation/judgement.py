"""All that is asked of sets of images, one question after the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from synthcube.artifact import Artifact
from synthcube.evaluation.config import EvaluationConfig
from synthcube.evaluation.images import ImageSet
from synthcube.evaluation.results import Section

log = logging.getLogger("synthcube")


class Judgement:
    """Sets of images, among them `predictions` and `labels`, and what they are compared with."""
