"""A certificate authority of a test's own, and the certificates that it signs. Made with the `openssl` command.

Knows nothing of Kubernetes: who a certificate is for is said by its caller.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

VALID_DAYS = "2"
AUTHORITY = """[req]
distinguished_name = subject
x509_extensions = extensions
[subject]
[extensions]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
LEAF = """[req]
distinguished_name = subject
x509_extensions = extensions
[subject]
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, as PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A CA whose files are in `folder`. `pair.certificate` is what others verify against."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pair = self._make("ca", "/CN=rig-ca", AUTHORITY)

    def sign(self, name: str, *, organization: str = "", hosts: tuple[str, ...] = ()) -> Pair:
        """A certificate for a server on `hosts` (IP addresses and DNS names), or for a client.

        Args:
            name: the common name, and the name of the two files.
            organization: a client's group.
        """
        extensions = LEAF
        if hosts:
            kinds = (f"{'IP' if host.replace('.', '').isdigit() else 'DNS'}:{host}" for host in hosts)
            extensions += f"subjectAltName = {', '.join(kinds)}\n"
        subject = (f"/O={organization}" if organization else "") + f"/CN={name}"
        by = ("-CA", str(self.pair.certificate), "-CAkey", str(self.pair.key))
        return self._make(name.replace(":", "-"), subject, extensions, *by)

    def _make(self, file_name: str, subject: str, settings: str, *arguments: str) -> Pair:
        made = Pair(self.folder / f"{file_name}.crt", self.folder / f"{file_name}.key")
        config = self.folder / f"{file_name}.cnf"
        config.write_text(settings)
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", VALID_DAYS, "-subj", subject]
        files = ["-config", str(config), "-keyout", str(made.key), "-out", str(made.certificate)]
        done = subprocess.run([*command, *files, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return made
