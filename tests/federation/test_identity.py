"""Certificates and the list of sites: what is accepted, and every fault by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from synthcube.errors import FederationError
from synthcube.federation import identity
from synthcube.federation.plan import FederationPlan

PLAN = FederationPlan(config={"seed": 0}, sites=("site-a", "site-b"), rounds=1)


@pytest.fixture(scope="module")
def owners(certificates: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    authority = certificates.Authority(tmp_path_factory.mktemp("authority"))
    return {name: authority.issue(name) for name in PLAN.sites}


def test_a_list_as_medperf_writes_it(certificates, owners, tmp_path: Path) -> None:
    path = certificates.site_list(tmp_path / "cols.yaml", list(owners.values()), list(owners))
    certificates_by_site = identity.site_certificates(path, PLAN)
    assert sorted(certificates_by_site) == ["site-a", "site-b"]
    pem = (owners["site-a"] / "crt.crt").read_text().replace("\n", "\n    ")
    text = path.read_text().splitlines()[1]
    path.write_text(f"site-a:\n  certificate: |\n    {pem}\n{text}\n", encoding="utf-8")
    assert identity.site_certificates(path, PLAN) == certificates_by_site


def test_all_faults_of_a_list_come_at_once(certificates, owners, tmp_path: Path) -> None:
    one = certificates.encoded(owners["site-a"])
    path = tmp_path / "cols.yaml"
    path.write_text(
        f"site-a: {{certificate: {one}}}\nsite-c: {{certificate: {one}}}\n"
        "site-d: {certificate: Erika}\n"
    )
    with pytest.raises(FederationError) as refusal:
        identity.site_certificates(path, PLAN)
    text = str(refusal.value)
    for fault in (
        "site-c: is not a site of the plan",
        "site-b: has no certificate",
        "site-c: has the certificate of site-a",
        "site-d: its certificate is neither PEM text nor that in base64",
    ):
        assert fault in text
    path.write_text("Site A: {certificate: x}\nsite-b: {email: x, key: y}\n")
    with pytest.raises(FederationError, match=r"LABEL: \{email: NAME, certificate: PEM in base64"):
        identity.site_certificates(path, PLAN)


def test_what_is_wrong_with_a_folder_of_certificates(owners, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"missing: crt.crt, key.key, root.crt"):
        identity.client_context(tmp_path)
    folder = shutil.copytree(owners["site-a"], tmp_path / "certificates")
    identity.client_context(folder)
    shutil.copy(owners["site-b"] / "key.key", folder)
    with pytest.raises(FederationError, match=r"key.key is not the key of crt.crt"):
        identity.client_context(folder)
    shutil.copy(owners["site-a"] / "key.key", folder)
    (folder / "root.crt").write_text("none")
    with pytest.raises(FederationError, match=r"root.crt holds no certificate"):
        identity.server_context(folder)


@pytest.mark.parametrize(
    "text", ["host", "host:", "host:x", "ho st:1", "host:70000", ":1", "a/b:1"]
)
def test_an_address_that_cannot_be_read(text: str) -> None:
    with pytest.raises(FederationError, match="write it as HOST:PORT"):
        identity.parsed_address(text)


def test_addresses() -> None:
    assert identity.parsed_address("a.example.org:443") == ("a.example.org", 443)
    assert identity.parsed_address("[::1]:5") == ("::1", 5)
