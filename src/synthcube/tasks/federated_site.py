"""A site of a federation: its own data, run and audit log; weights and counts leave it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from synthcube import compute, environment, storage
from synthcube.config import RunConfig
from synthcube.data.manifest import read_manifest
from synthcube.data.module import DataModule
from synthcube.errors import FederationError
from synthcube.federation import agreement as agreements
from synthcube.federation import audit, rounds
from synthcube.federation.agreement import Agreement, SiteFacts
from synthcube.federation.audit import AuditLine
from synthcube.federation.plan import FederationPlan, digest_of
from synthcube.federation.update import read_average, write_update
from synthcube.models.family import ScalesByMoments
from synthcube.schema import Moments
from synthcube.tasks.train import FederatedRound, train_round
from synthcube.training import checkpoints

AUDIT, RUN, UPDATE, DATA = "audit.jsonl", "run", "update.safetensors", "data.csv"


@dataclass(frozen=True, slots=True)
class Site:
    """One site.

    Args:
        label: its name in the federation.
        folder: everything that it writes.
        settings: config of its run, made by :func:`synthcube.federation.plan.federated`.
    """

    label: str
    folder: Path
    plan: FederationPlan
    settings: RunConfig

    @property
    def data(self) -> Path:
        """The list of its images."""
        return self.folder / DATA

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of its run."""
        return self.folder / RUN / "checkpoints" / checkpoints.LAST

    def facts(self) -> SiteFacts:
        """What it tells of its data before the first round."""
        data = DataModule(
            read_manifest(self.data), self.settings.data,
            batch_size=self.settings.training.batch_size, seed=self.settings.seed,
            cache=environment.cache_folder(), conditions=(),
        )  # fmt: skip
        return agreements.site_facts(
            self.plan, data.image, data.manifest.rows, data.rows("train"),
            self.settings.data.conditions,
            getattr(self.settings.model, "first_stage_sha256", ""), self._moments(data),
        )  # fmt: skip

    def _moments(self, data: DataModule) -> Moments | None:
        """Of the latents of its training images, if the family scales by them."""
        with torch.random.fork_rng():
            family = self.settings.model.build(data.image.encoded)
        if not isinstance(family, ScalesByMoments):
            return None
        family.to(compute.device(self.settings.compute.accelerator))
        family.fit_statistics(data.every_image(), data.rows("train"))
        return family.moments()

    def accept(self, agreement: Agreement, facts: SiteFacts) -> None:
        """Check the agreement against its own plan and data. Raises FederationError."""
        agreements.check_agreement(agreement, self.plan, self.label, facts)
        self.log("sent", "facts", 0, digest_of(facts), len(facts.model_dump_json()), facts.images)
        size = len(agreement.model_dump_json())
        self.log("received", "agreement", 0, agreement.sha256, size, sum(agreement.images.values()))

    def train_round(self, agreement: Agreement, number: int, average: Path | None) -> Path:
        """Train up to the end of a round, and return the file to send.

        A round that was begun is continued, one that is complete is not repeated.

        Args:
            number: of the round, from 1.
            average: file with the weights that the round before came to; None before the first.
        """
        begin, end = (epochs * self.plan.local_epochs for epochs in (number - 1, number))
        last = self.checkpoint
        place = checkpoints.position(last) if last.exists() else (0, 0)
        if place[0] < end:
            if average and place == (begin, 0):
                self._take(agreement, number, average)
            elif place[0] < begin:
                raise FederationError(
                    f"Round {number} begins after epoch {begin}, and the run of this site is in "
                    f"epoch {place[0] + 1}: it has lost a checkpoint. Start in another folder."
                )
            until = FederatedRound(agreement.image, end, agreement.moments)
            train_round(self.settings, self.data, self.folder / RUN, until)
        images = agreement.images[self.label]
        update = rounds.update_of(
            last, plan=self.plan.sha256, agreement=agreement.sha256, number=number, images=images
        )
        path = self.folder / UPDATE
        write_update(path, update)
        size, digest = path.stat().st_size, storage.sha256(path)
        self.log("sent", "weights", number, digest, size, images)
        return path

    def _take(self, agreement: Agreement, number: int, path: Path) -> None:
        """Go on with the average of the round before."""
        average = read_average(path, self.plan.sha256, agreement.sha256, number - 1)
        rounds.replace_weights(self.checkpoint, average)
        size, digest = path.stat().st_size, storage.sha256(path)
        self.log("received", "average", number - 1, digest, size, average.header.images)

    def log(self, event: str, kind: str, number: int, sha256: str, size: int, images: int) -> None:
        """Add a line to its audit log."""
        line = {
            "event": event, "kind": kind, "site": self.label, "round": number,
            "plan": self.plan.sha256, "sha256": sha256, "bytes": size, "images": images,
        }  # fmt: skip
        audit.append(self.folder / AUDIT, AuditLine.model_validate(line))
