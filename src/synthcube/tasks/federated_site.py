"""A site of a federation: its own data, run and audit log; weights and counts leave it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

from synthcube import compute, environment, reading, storage
from synthcube.config import RunConfig
from synthcube.data.manifest import manifest_text, read_manifest
from synthcube.data.module import DataModule
from synthcube.errors import ConfigError, FederationError
from synthcube.federation import agreement as agreements
from synthcube.federation import audit, masking, rounds
from synthcube.federation.agreement import Agreement, SiteFacts
from synthcube.federation.audit import AuditLine
from synthcube.federation.masking import MaskKey
from synthcube.federation.plan import FederationPlan, digest_of
from synthcube.federation.update import Update, read_average, write_update
from synthcube.models.family import ScalesByMoments
from synthcube.schema import Count, Moments, Schema
from synthcube.tasks.train import FederatedRound, train_round
from synthcube.training import checkpoints
from synthcube.training.proximal import Proximal

log = logging.getLogger("synthcube")

AUDIT, RUN, UPDATE, DATA, PROGRESS, MASK_KEY = (
    "audit.jsonl", "run", "update.safetensors", "data.csv", "progress.json", "mask.key",
)  # fmt: skip


class Progress(Schema):
    """The round that a site has begun, written once the average of the round before is taken."""

    round: Count = Field(description="Round, from 1.")
    until_epoch: Count = Field(description="Epochs of the site's own run at its end.")


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
    def is_private(self) -> bool:
        """Whether it trains with differential privacy."""
        return self.settings.training.privacy is not None

    @property
    def mask_key(self) -> MaskKey:
        """Its key for secure aggregation, new where there is none yet."""
        return MaskKey(storage.make_folder(self.folder) / MASK_KEY)

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of its run."""
        return self.folder / RUN / "checkpoints" / checkpoints.LAST

    def facts(self) -> SiteFacts:
        """What it tells of its data before the first round."""
        data = DataModule(
            read_manifest(self.data), self.settings.data,
            batch_size=self.settings.training.batch_size, seed=self.settings.seed,
            cache=environment.cache_folder(), conditions=(), private=self.is_private,
        )  # fmt: skip
        return agreements.site_facts(
            self.plan, data.image, data.manifest.rows, data.rows("train"),
            self.settings.data.conditions, declared=self.settings.data.classes,
            first_stage_sha256=getattr(self.settings.model, "first_stage_sha256", ""),
            moments=None if self.is_private else self._moments(data),
            subjects=len(data.training_subjects) if self.is_private else None,
            mask_key=self.mask_key.public if self.plan.secure_aggregation else "",
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

    def record_images(self, rows: Sequence[Mapping[str, str]]) -> None:
        """Write the list of its images, or refuse another one than it was begun with."""
        text = manifest_text(rows)
        if not self.data.exists():
            storage.make_folder(self.folder)
            storage.write_text(self.data, text)
            return
        before = reading.read_text(self.data, FederationError, limit=reading.MAX_LIST_BYTES)
        if before != text:
            raise ConfigError(
                f"{self.data}: the federation was begun on other images; give another "
                "output_path, or the same data."
            )

    def log_facts(self, facts: SiteFacts) -> None:
        """Note in its audit log that its facts are sent."""
        self.log("sent", "facts", 0, digest_of(facts), len(facts.model_dump_json()), facts.images)

    def accept(self, agreement: Agreement, facts: SiteFacts) -> None:
        """Check the agreement against its own plan and data. Raises FederationError."""
        agreements.check_agreement(agreement, self.plan, self.label, facts)
        size = len(agreement.model_dump_json())
        self.log("received", "agreement", 0, agreement.sha256, size, sum(agreement.images.values()))

    def require_budget(self, *, has_sent: bool) -> None:
        """Refuse to train privately where what this site has spent is not known any more.

        Args:
            has_sent: whether others have weights of this site.

        Raises:
            FederationError: weights of it are known, and its checkpoint is lost.
        """
        if not self.is_private or self.checkpoint.exists():
            return
        lines = audit.read(self.folder / AUDIT)
        if has_sent or any((line.event, line.kind) == ("sent", "weights") for line in lines):
            raise FederationError(
                f"{self.checkpoint}: this site has sent weights that were trained privately, and "
                "the checkpoint that counts what they have spent is lost. Without it the privacy "
                "budget would start over: put the folder back, or leave this site out."
            )

    def train_round(self, agreement: Agreement, number: int, average: Path | None) -> Path:
        """Train up to the end of a round, and return the file to send.

        A round that was begun is continued, one that is complete is not repeated. A site counts on
        from its own epochs, not from the round: one that missed rounds trains no longer for that.

        Args:
            number: of the round, from 1.
            average: file with the weights that the round before came to; None before the first.
        """
        last = self.checkpoint
        progress = self._begun(agreement, number, average)
        if not last.exists() or checkpoints.position(last)[0] < progress.until_epoch:
            weights = None
            if average:
                begun = read_average(average, self.plan.sha256, agreement.sha256, number - 1)
                weights = rounds.latest_weights(begun)
            proximal = Proximal(self.plan.proximal, weights) if self.plan.proximal else None
            until = FederatedRound(
                agreement.image, progress.until_epoch, agreement.moments, weights, proximal
            )  # fmt: skip
            train_round(self.settings, self.data, self.folder / RUN, until)
        images = agreement.images[self.label]
        update = rounds.update_of(
            last, plan=self.plan.sha256, agreement=agreement.sha256, number=number, images=images,
            private_site=self.label if self.is_private else None,
        )  # fmt: skip
        if self.plan.secure_aggregation:
            update = masking.masked(update, self.label, agreement, self.mask_key)
        path = self.folder / UPDATE
        write_update(path, update)
        size, digest = path.stat().st_size, storage.sha256(path)
        if self.plan.secure_aggregation:
            self._require_same(number, digest)
        spent = update.header.privacy.get(self.label)
        self.log("sent", "weights", number, digest, size, images, spent.epsilon if spent else None)
        return path

    def _require_same(self, number: int, digest: str) -> None:
        """Refuse to mask other weights of a round as before: the difference would be seen."""
        for line in audit.read(self.folder / AUDIT):
            is_of_round = (line.event, line.kind, line.round) == ("sent", "weights", number)
            if is_of_round and line.sha256 != digest:
                raise FederationError(
                    f"This site has sent other weights in round {number}, with the same mask: its "
                    "checkpoint was lost or changed. Put it back, or start in other folders."
                )

    def _begun(self, agreement: Agreement, number: int, average: Path | None) -> Progress:
        """The progress in a round, which begins here if it has not yet."""
        path, last = self.folder / PROGRESS, self.checkpoint
        if path.exists() and last.exists():
            before = reading.read_record(path, Progress, FederationError)
            if before.round == number:
                return before
            if before.round > number:
                raise FederationError(
                    f"Round {number} is to be trained, and this site has begun round "
                    f"{before.round}: the coordinator has lost rounds. Start in other folders."
                )
        epochs = 0
        if last.exists():
            epochs = checkpoints.position(last)[0]
            if average:
                begun = self.receive_average(agreement, number - 1, average)
                rounds.replace_weights(last, begun)
        elif average:
            self.receive_average(agreement, number - 1, average)
            log.warning("This site has no checkpoint: it goes on with the average alone.")
        until = min(epochs + self.plan.local_epochs, self.plan.epochs)
        progress = Progress(round=number, until_epoch=until)
        storage.write_json(path, progress.model_dump())
        return progress

    def receive_average(self, agreement: Agreement, number: int, path: Path) -> Update:
        """The average of a round, read from its file; a line in the audit log tells of it."""
        average = read_average(path, self.plan.sha256, agreement.sha256, number)
        size, digest = path.stat().st_size, storage.sha256(path)
        self.log("received", "average", number, digest, size, average.header.images)
        return average

    def log(
        self, event: str, kind: str, number: int, sha256: str, size: int, images: int,
        epsilon: float | None = None,
    ) -> None:  # fmt: skip
        """Add a line to its audit log."""
        line = {
            "event": event, "kind": kind, "site": self.label, "round": number,
            "plan": self.plan.sha256, "sha256": sha256, "bytes": size, "images": images,
            "epsilon": epsilon,
        }  # fmt: skip
        audit.append(self.folder / AUDIT, AuditLine.model_validate(line))
