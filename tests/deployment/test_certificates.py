"""Keys and certificates: who can read them, what is in them, and what is kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_ssh_private_key,
    load_ssh_public_key,
)

from tests.deployment.machines import SCRIPT, deployment

pytestmark = pytest.mark.deployment


def modes(folder: Path) -> dict[str, str]:
    """{file name: octal permissions}."""
    return {
        path.name: oct(path.stat().st_mode & 0o777)[2:] for path in folder.iterdir()
    }


def test_keys_are_private_and_certificates_name_their_hosts(tmp_path: Path) -> None:
    with deployment(tmp_path) as here:
        here.call("certificates", here.keys, 2, "gpu-1.example.org", "10.0.0.7")
    assert oct(here.keys.stat().st_mode & 0o777) == "0o700"
    private = {"ca.key", "server.key", "node_0", "node_1"}
    assert {n for n, mode in modes(here.keys).items() if mode == "600"} >= private
    authority = x509.load_pem_x509_certificate((here.keys / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((here.keys / "server.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "gpu-1.example.org"]
    addresses = names.get_values_for_type(x509.IPAddress)
    assert [str(address) for address in addresses] == ["127.0.0.1", "10.0.0.7"]
    key = load_ssh_private_key((here.keys / "node_1").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    public = load_ssh_public_key((here.keys / "node_1.pub").read_bytes())
    assert key.public_key() == public


def test_what_is_there_stays_and_nodes_are_added(tmp_path: Path) -> None:
    with deployment(tmp_path) as here:
        here.call("certificates", here.keys, 1)
        before = {p.name: p.read_bytes() for p in here.keys.iterdir()}
        here.call("certificates", here.keys, 2)
        after = {p.name: p.read_bytes() for p in here.keys.iterdir()}
    assert after.keys() - before.keys() == {"node_1", "node_1.pub"}
    assert {name: after[name] for name in before} == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with deployment(tmp_path) as here:
        here.call("certificates", here.keys, 1)
        (here.keys / "node_0").chmod(0o644)
        output = here.call(
            "supernode",
            here.keys,
            tmp_path / "home",
            here.address,
            0,
            tmp_path,
            expect=1,
        )
        assert "node_0 may be read by others (mode 644); chmod 600" in output
        (here.keys / "server.key").chmod(0o640)
        home = here.homes / "superlink"
        output = here.call("superlink", here.keys, home, here.address, expect=1)
        assert "server.key may be read by others (mode 640)" in output


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["run", "keys"], ["supernode"]])
def test_the_usage_teaches(arguments: list[str]) -> None:
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "flower_deployment.sh certificates KEYS CLIENTS [HOST ...]" in done.stderr
