"""The coordinator of a federation: it waits for the sites, checks what they send, and averages.

It has no images. All of its state is in files, so that the same command continues it after a kill
at any moment. Threads of the server hand in messages; one thread leads through the rounds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from synthcube import reading, storage
from synthcube.errors import FederationError, SynthCubeError
from synthcube.federation import audit, averaging
from synthcube.federation.aggregation import ExpectedModel, aggregated
from synthcube.federation.agreement import Agreement, SiteFacts, agree
from synthcube.federation.audit import AuditLine
from synthcube.federation.messages import (
    Phase,
    RefusalCode,
    RefusalError,
    RoundRecord,
    RoundRecords,
    SiteFault,
    State,
    Status,
)
from synthcube.federation.plan import FederationPlan, digest_of
from synthcube.federation.update import read_header, read_update, write_update
from synthcube.schema import Schema

log = logging.getLogger("synthcube")

S = TypeVar("S", bound=Schema)

FACTS, UPDATES, ROUNDS, AUDIT = "facts", "updates", "rounds.json", "audit.jsonl"
_REPETITIONS = 3
"""How often a round is waited for again that too few sites came to."""
_FAREWELL_S = 30.0  # for sites to hear that there will be no agreement
_POLL_S = 0.5


@dataclass(slots=True)
class _Round:
    """What came in a round, by the label of the site."""

    number: int = 0
    updates: dict[str, Path] = field(default_factory=dict)
    refused: dict[str, RefusalError] = field(default_factory=dict)
    failed: dict[str, SiteFault] = field(default_factory=dict)


class Coordinator:
    """Leads a federation from the facts of its sites to the last average.

    Args:
        folder: where its state is.
        kinds: "class" or "number" of each column that the images follow.
        round_minutes: how long to wait for all sites; then `minimum_sites` are enough.
        expected: what updates must have under an agreement.
        agreement_path, average_path: files of the state that others read too.
    """

    def __init__(
        self, plan: FederationPlan, folder: Path, kinds: Mapping[str, str], round_minutes: float,
        expected: Callable[[Agreement], ExpectedModel], agreement_path: Path, average_path: Path,
    ) -> None:  # fmt: skip
        self.plan, self.folder, self.kinds = plan, folder, kinds
        self.round_minutes, self._expect = round_minutes, expected
        self.agreement_path, self.average_path = agreement_path, average_path
        self.updates = storage.make_folder(folder / UPDATES)
        storage.make_folder(folder / FACTS)
        self.model: ExpectedModel | None = None
        self._changed = threading.Condition()
        self._phase: Phase = "facts"
        self._round = _Round()
        self._faults: tuple[str, ...] = ()
        self._stopped: SynthCubeError | None = None
        lines = audit.read(folder / AUDIT)
        self._informed = {
            line.site
            for line in lines
            if (line.event, line.kind, line.round) == ("sent", "average", plan.rounds)
        }
        """Sites that know how it ended."""
        self._senders = {line.site for line in lines if line.kind == "weights"}
        """Sites whose weights came, if only in part."""
        self._agreement: Agreement | None = None
        if agreement_path.exists():
            self._agreement = _read(agreement_path, Agreement)
            self.model = expected(self._agreement)
            # Before any site can ask: none must hear of a round that is not.
            self._begin_round(self._agreement, min(self._last_round() + 1, plan.rounds))

    # What threads of the server call; a refusal is raised as RefusalError.

    def state(self, site: str) -> State:
        """Where the federation stands, for a site."""
        with self._changed:
            has_yours = (
                self._facts_path(site).exists()
                if self._phase == "facts"
                else site in self._round.updates
            )
            return State(
                plan=self.plan.sha256, site=site, phase=self._phase,
                round=self._round.number, has_yours=has_yours, has_sent=site in self._senders,
                faults=self._faults,
            )  # fmt: skip

    def status(self) -> Status:
        """Where the federation stands, for an administrator."""
        with self._changed:
            current = self._round
            failed = {site: fault.kind for site, fault in sorted(current.failed.items())}
            refused = {site: refusal.code for site, refusal in sorted(current.refused.items())}
            if self._phase in ("facts", "failed"):
                sites, arrived = {*self.plan.sites}, {*self._sites_with_facts()}
            else:
                sites = {*self._agreement.images} if self._agreement else set()
                arrived = sites if self._phase == "done" else {*current.updates}
            return Status(
                plan=self.plan.sha256, phase=self._phase, round=current.number,
                rounds=self.plan.rounds, arrived=tuple(sorted(arrived)),
                awaited=tuple(sorted(sites - arrived - failed.keys() - refused.keys())),
                refused=refused, failed=failed, done=self._records(),
            )  # fmt: skip

    def take_facts(self, site: str, facts: SiteFacts, size: int) -> None:
        """Keep what a site tells of its data; again, what it told before is replaced."""
        with self._changed:
            if facts.plan != self.plan.sha256:
                raise RefusalError("plan", f"the facts are of another plan ({facts.plan[:12]})")
            if self._phase != "facts":
                told = self._agreement and site in self._agreement.images
                code: RefusalCode = "late" if told else "site"
                raise RefusalError(code, "the sites have agreed already")
            storage.write_json(self._facts_path(site), facts.model_dump(mode="json"))
            self._log("received", "facts", site, 0, digest_of(facts), size, facts.images)
            log.info("%s told its facts: %d images.", site, facts.images)
            self._changed.notify_all()

    def agreement(self, site: str) -> Agreement:
        """What the sites have agreed on."""
        with self._changed:
            agreement = self._require_part(site)
            size = len(agreement.model_dump_json())
            images = sum(agreement.images.values())
            self._log("sent", "agreement", site, 0, agreement.sha256, size, images)
            return agreement

    def require_round(self, site: str, number: int) -> ExpectedModel:
        """Refuse an update that is not awaited, before its weights are read."""
        with self._changed:
            self._require_part(site)
            if number < self._round.number or self._phase == "done":
                raise RefusalError(
                    "late", f"round {number} is over: the newest average is of round "
                    f"{self._last_round()}",
                )  # fmt: skip
            if number > self._round.number:
                raise RefusalError("not_yet", f"round {self._round.number} is not over")
            assert self.model
            return self.model

    def note_refused(self, site: str, number: int, digest: str, size: int) -> None:
        """Note that weights came which are not checked: they are late, or were cut off."""
        with self._changed:
            self._log("refused", "weights", site, number, digest, size, 0)

    def take_update(self, site: str, number: int, path: Path, digest: str) -> None:
        """Check an update in a file, and keep a copy for the average of the round."""
        with self._changed:
            size = path.stat().st_size
            try:
                self.require_round(site, number)
                images = self._check(site, number, path)
            except RefusalError as refusal:
                self._log("refused", "weights", site, number, digest, size, 0)
                if refusal.code == "late":
                    raise
                self._round.refused[site] = refusal
                log.warning(
                    "The update of %s in round %d is refused: %s.", site, number, refusal.code
                )
                self._changed.notify_all()
                raise
            # First the log: no kill leaves weights in the average that it does not tell of.
            self._log("received", "weights", site, number, digest, size, images)
            kept = self.updates / f"{site}.safetensors"
            storage.write_with(kept, partial(storage.link_or_copy, path))
            self._enter(site, kept)

    def take_fault(self, site: str, fault: SiteFault) -> None:
        """Note that a site has an error, so that its round does not wait for it."""
        with self._changed:
            if fault.round != self._round.number or self._phase != "rounds":
                return
            self._round.failed[site] = fault
            log.warning("%s has an error in round %d: %s.", site, fault.round, fault.kind)
            self._changed.notify_all()

    def average(self, site: str, number: int) -> Path:
        """The file with the average of a round, which must be the newest."""
        with self._changed:
            self._require_part(site)
            last = self._last_round()
            if number != last:
                code: RefusalCode = "late" if number < last else "not_yet"
                raise RefusalError(code, f"the newest average is of round {last}")
            return self.average_path

    def average_was_sent(self, site: str, number: int, digest: str, size: int) -> None:
        """Note that a site has the average of a round."""
        with self._changed:
            images = sum(self._agreement.images.values()) if self._agreement else 0
            self._log("sent", "average", site, number, digest, size, images)
            if number == self.plan.rounds:
                self._informed.add(site)
                self._changed.notify_all()

    def failure_was_told(self, site: str) -> None:
        """Note that a site knows that there will be no agreement."""
        with self._changed:
            self._informed.add(site)
            self._changed.notify_all()

    def stop(self, error: SynthCubeError) -> None:
        """End the leading thread with an error, as nothing will come any more."""
        with self._changed:
            self._stopped = error
            self._changed.notify_all()

    # What the leading thread calls.

    def lead(self) -> Agreement:
        """Lead through agreement and rounds to the last average, in `average_path`.

        Raises FederationError if the sites cannot train together, or too few of them come.
        """
        agreement = self._agreement or self._agree()
        for number in range(self._last_round() + 1, self.plan.rounds + 1):
            self._do_round(agreement, number)
        with self._changed:
            self._phase = "done"
            self._round = _Round(self.plan.rounds)
        return agreement

    def say_farewell(self, limit_s: float) -> list[str]:
        """Wait until all sites of the agreement have the last average; returns those without."""
        agreement = self._agreement
        sites = {*agreement.images} if agreement else set()
        self._wait(lambda: sites <= self._informed, limit_s)
        return sorted(sites - self._informed)

    def _agree(self) -> Agreement:
        log.info("Waiting for the facts of %s.", ", ".join(self.plan.sites))
        sites = self.plan.sites
        self._gather("The agreement", self._sites_with_facts,
                     lambda: [s for s in sites if not self._facts_path(s).exists()])  # fmt: skip
        with self._changed:
            facts = {
                site: _read(path, SiteFacts)
                for site in sites
                if (path := self._facts_path(site)).exists()
            }
        try:
            agreement = agree(self.plan, self.kinds, facts)
            model = self._expect(agreement)
        except FederationError as error:
            with self._changed:
                self._phase = "failed"
                self._faults = tuple(fault[:1000] for fault in error.faults or (error.headline,))
            self._wait(lambda: {*facts} <= self._informed, _FAREWELL_S)
            for site in facts:  # they tell them again, once the data or the plan is corrected
                self._facts_path(site).unlink(missing_ok=True)
            raise
        with self._changed:
            storage.write_json(self.agreement_path, agreement.model_dump(mode="json"))
            self._agreement, self.model = agreement, model
            self._phase, self._round = "rounds", _Round(1)
        log.info("%d sites agree, with %d images.", len(facts), sum(agreement.images.values()))
        return agreement

    def _begin_round(self, agreement: Agreement, number: int) -> None:
        with self._changed:
            self._phase, self._round = "rounds", _Round(number)
            for site in agreement.images:  # after a kill
                path = self.updates / f"{site}.safetensors"
                with suppress(FederationError):  # damaged since it was checked and kept
                    if path.exists() and read_header(path).round == number:
                        self._enter(site, path)

    def _do_round(self, agreement: Agreement, number: int) -> None:
        if self._round.number < number:
            self._begin_round(agreement, number)
        current = self._round

        def waited_for() -> list[str]:
            known = current.updates.keys() | current.refused.keys() | current.failed.keys()
            return sorted(agreement.images.keys() - known)

        self._gather(f"Round {number}", lambda: [*current.updates], waited_for)
        with self._changed:
            assert self.model
            updates = {site: read_update(path) for site, path in current.updates.items()}
            before = read_update(self.average_path) if number > 1 else None
            average = aggregated(
                self.plan, agreement, number, updates, self.model, self.folder, before
            )
            self._record(agreement, current, waited_for())
            write_update(self.average_path, average)
            if number < self.plan.rounds:  # else until the model is written
                self._round = _Round(number + 1)
        shares = averaging.image_weights(agreement, updates)
        shown = ", ".join(f"{label} {share:.0%}" for label, share in sorted(shares.items()))
        log.info("Round %d of %d is averaged: %s.", number, self.plan.rounds, shown)

    def _record(self, agreement: Agreement, current: _Round, absent: list[str]) -> None:
        """Add the round to the records; one that a kill left behind is replaced."""
        record = RoundRecord(
            round=current.number,
            sites={site: agreement.images[site] for site in sorted(current.updates)},
            refused={site: refusal.code for site, refusal in sorted(current.refused.items())},
            failed={site: fault.kind for site, fault in sorted(current.failed.items())},
            absent=tuple(absent),
        )
        kept = [earlier for earlier in self._records() if earlier.round < current.number]
        records = RoundRecords(rounds=(*kept, record))
        storage.write_json(self.folder / ROUNDS, records.model_dump(mode="json"))

    def _records(self) -> tuple[RoundRecord, ...]:
        """The rounds that are recorded so far."""
        path = self.folder / ROUNDS
        return _read(path, RoundRecords).rounds if path.exists() else ()

    def _gather(
        self, what: str, there: Callable[[], list[str]], awaited: Callable[[], list[str]]
    ) -> None:
        """Wait for all sites, or for enough of them once the time is up.

        Raises FederationError after the last repetition with too few.
        """
        minimum = self.plan.minimum_sites
        for repetition in range(_REPETITIONS + 1):
            self._wait(lambda: not awaited() and len(there()) >= minimum, 60 * self.round_minutes)
            if len(there()) >= minimum:
                if missing := awaited():
                    log.warning("%s goes on without %s.", what, ", ".join(missing))
                return
            log.warning(
                "%s: %d of the needed %d sites came within %g minutes%s.", what, len(there()),
                minimum, self.round_minutes,
                "" if repetition == _REPETITIONS else "; waiting again",
            )  # fmt: skip
        raise FederationError(
            f"{what} has too few sites: {len(there())} came, minimum_sites is {minimum}. Nothing "
            f"is lost: the same command goes on. Missing: {', '.join(awaited()) or 'none'}."
        )

    def _wait(self, is_over: Callable[[], bool], limit_s: float) -> None:
        end = time.monotonic() + limit_s
        with self._changed:
            while not is_over() and not self._stopped and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, _POLL_S))
            if self._stopped:
                raise self._stopped

    def _check(self, site: str, number: int, path: Path) -> int:
        """The images that an update stands for; raises RefusalError with all faults of it."""
        agreement, model = self._agreement, self.model
        assert agreement
        assert model
        try:
            update = read_update(path)
        except FederationError as error:
            raise RefusalError("damaged", error.headline) from error
        spent = read_header(self.average_path).privacy if self.average_path.exists() else {}
        faults = list(
            averaging.update_faults(self.plan, agreement, number, site, update, model.shapes, spent)
        )
        agreed, claimed = agreement.images[site], update.header.images
        if claimed > agreed:
            text = f"claims {claimed} images, {agreed} were agreed on"
            faults.append(averaging.UpdateFault("images", text))
        if faults:
            raise RefusalError(faults[0].code, *(fault.text[:1000] for fault in faults[:20]))
        if update.header.constants != model.constants:
            raise RefusalError("constants", "its whole numbers are not those of the plan's model")
        return claimed

    def _enter(self, site: str, path: Path) -> None:
        current = self._round
        current.updates[site] = path
        current.refused.pop(site, None)
        current.failed.pop(site, None)
        log.info("Round %d: the update of %s is here.", current.number, site)
        self._changed.notify_all()

    def _require_part(self, site: str) -> Agreement:
        """The agreement; refused to a site that took no part in it."""
        if self._agreement is None:
            raise RefusalError("not_yet", "the sites have not agreed yet")
        if site not in self._agreement.images:
            raise RefusalError("site", "it came after the agreement, and takes no part")
        return self._agreement

    def _last_round(self) -> int:
        """The round of the newest average; 0 if there is none."""
        return read_header(self.average_path).round if self.average_path.exists() else 0

    def _sites_with_facts(self) -> list[str]:
        return [site for site in self.plan.sites if self._facts_path(site).exists()]

    def _facts_path(self, site: str) -> Path:
        return self.folder / FACTS / f"{site}.json"

    def _log(
        self, event: str, kind: str, site: str, number: int, sha256: str, size: int, images: int
    ) -> None:
        line = {
            "event": event, "kind": kind, "site": site, "round": number, "bytes": size,
            "plan": self.plan.sha256, "sha256": sha256, "images": images,
        }  # fmt: skip
        if kind == "weights":
            self._senders.add(site)
        audit.append(self.folder / AUDIT, AuditLine.model_validate(line))


def _read(path: Path, kind: type[S]) -> S:
    """What was kept in a file."""
    return reading.validated(
        reading.read_object(path, FederationError), kind, path, FederationError
    )
