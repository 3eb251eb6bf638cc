"""All that is asked of sets of images, one question after the other."""

from __future__ import annotations

import logging

log = logging.getLogger("synthcube")


class Judgement:
    """Sets of images, among them `predictions` and `labels`, and what they are compared with."""
