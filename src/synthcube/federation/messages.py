"""What the coordinator and a site tell each other beside weights: small, strict JSON."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from synthcube.errors import FederationError, SynthCubeError
from synthcube.federation.averaging import FaultCode
from synthcube.federation.plan import Digest, SiteName
from synthcube.schema import MAX_COUNT, Count, List, Schema

MAX_MESSAGE_BYTES = 1 << 24
"""Largest message without weights; facts and an agreement hold names of classes."""
STATUS = "/v1/status"
"""Address that an administrator alone is answered at."""
RECEIVED = "/v1/received"
"""Where a site behind a relay says that an average is there: the relay may end only then."""
SITE_HEADER, PLAN_HEADER, HASH_HEADER = "X-Site", "X-Plan", "X-Content-SHA256"

RefusalCode = (
    FaultCode
    | Literal[
        "certificate",  # not in the list of the coordinator
        "constants",  # whole numbers that are not averaged
        "damaged",  # not what it should be, or another hash than announced
        "late",  # of a round that is over
        "not_yet",  # asked for too early
        "size",  # larger than the plan allows
        "unknown",  # no such address
    ]
)
_HTTP_STATUS: dict[str, int] = {
    "certificate": 403, "site": 403, "unknown": 404, "late": 409, "not_yet": 409, "plan": 409,
    "size": 413,
}  # fmt: skip

Phase = Literal["facts", "rounds", "failed", "done"]
Text = Annotated[str, Field(max_length=2000)]


class RefusalError(FederationError):
    """The coordinator does not accept a message of a site; the code may be logged."""

    def __init__(self, code: RefusalCode, *faults: str) -> None:
        self.code: RefusalCode = code
        super().__init__("The coordinator refused a message of this site:", faults)

    @property
    def status(self) -> int:
        """The HTTP status of the reply."""
        return _HTTP_STATUS.get(self.code, 422)

    @property
    def reply(self) -> Refusal:
        """What the site is told."""
        return Refusal(code=self.code, faults=tuple(fault[:1000] for fault in self.faults))


class Refusal(Schema):
    """The reply to a message that is not accepted."""

    code: RefusalCode = Field(description="The kind of fault.")
    faults: List[Text] = Field(default=(), description="All reasons.")


class State(Schema):
    """Where a federation stands, for one site."""

    plan: Digest = Field(description="Hash of the plan.")
    site: SiteName = Field(description="The site that the certificate belongs to.")
    phase: Phase = Field(
        description="facts: before the agreement; failed: the sites cannot train together."
    )
    round: int = Field(ge=0, le=MAX_COUNT, description="The round that updates are awaited of.")
    has_yours: bool = Field(description="Whether this site has sent what is awaited now.")
    has_sent: bool = Field(
        default=False,
        description="Whether weights of this site ever came, those that were refused too.",
    )
    faults: List[Text] = Field(default=(), description="Why the sites cannot train together.")


FAULT_KINDS = tuple(
    sorted(
        kind.__name__
        for kind in SynthCubeError.__subclasses__()
        if kind.__module__ == SynthCubeError.__module__
    )
)
"""Names of the errors that a site may tell; their texts stay at the site."""


class SiteFault(Schema):
    """A site says that it cannot send an update: only the kind of its error, no text."""

    round: Count = Field(description="Round that it was in.")
    kind: Annotated[str, Field(pattern=rf"^({'|'.join((*FAULT_KINDS, 'other'))})$")] = Field(
        description="Class of the error, or other."
    )


class RoundRecord(Schema):
    """Which sites were in a round, and why others were not."""

    round: Count = Field(description="Round, from 1.")
    sites: dict[SiteName, Count] = Field(description="Images of the sites that were averaged.")
    refused: dict[SiteName, RefusalCode] = Field(default={}, description="RefusalError updates.")
    failed: dict[SiteName, str] = Field(default={}, description="Sites with an error, by kind.")
    absent: List[SiteName] = Field(default=(), description="Sites that sent nothing in time.")


class RoundRecords(Schema):
    """The rounds of a federation so far."""

    rounds: List[RoundRecord] = Field(default=(), description="In their order.")


class Status(Schema):
    """Where a federation stands, for an administrator: counts and labels, nothing of an image."""

    plan: Digest = Field(description="Hash of the plan.")
    phase: Phase = Field(description="facts: before the agreement; done: all rounds are over.")
    round: int = Field(ge=0, le=MAX_COUNT, description="The round that updates are awaited of.")
    rounds: Count = Field(description="Rounds in all.")
    arrived: List[SiteName] = Field(description="Sites whose facts or updates are here.")
    awaited: List[SiteName] = Field(description="Sites that are waited for.")
    refused: dict[SiteName, RefusalCode] = Field(description="Updates of the round, by reason.")
    failed: dict[SiteName, str] = Field(description="Sites with an error in the round, by kind.")
    done: List[RoundRecord] = Field(description="The rounds that are over.")
