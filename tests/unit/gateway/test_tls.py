"""HTTPS: files that serve, and files that cannot."""

import datetime
import ssl
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from molink.cli.http_flags import take_tls
from molink.core.errors import UsageError
from molink.gateway.connection import Answer
from molink.gateway.http import Request
from molink.gateway.server import GatewayServer, Tls


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certfile, keyfile = tmp_path / "cert.pem", tmp_path / "key.pem"
    certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    keyfile.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certfile, keyfile


async def hello(request: Request, answer: Answer) -> None:
    answer.json(b'"hello"')


async def test_a_client_that_knows_the_certificate_is_answered(files: tuple[Path, Path]) -> None:
    tls, left = take_tls(
        [f"--ssl-certfile={files[0]}", "--seed", "1", "--ssl-keyfile", str(files[1])]
    )
    assert left == ["--seed", "1"]
    server = GatewayServer(hello)
    port = await server.start("localhost", 0, tls)
    known = ssl.create_default_context(cafile=str(files[0]))
    async with httpx.AsyncClient(verify=known, trust_env=False) as client:
        assert (await client.get(f"https://localhost:{port}/")).json() == "hello"
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get(f"https://localhost:{port}/")
    await server.stop()


def test_files_that_cannot_serve(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other.pem").write_text("nothing")
    for bad in (
        Tls(str(tmp_path / "none.pem"), str(files[1])),
        Tls(str(files[0]), str(tmp_path / "other.pem")),
        Tls(str(files[0]), str(files[1]), str(tmp_path / "none.pem")),
    ):
        with pytest.raises(UsageError, match="cannot serve HTTPS"):
            bad.context()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ssl-keyfile=x"], "needs --ssl-certfile"),
        (["--ssl-certfile=x", "--ssl-cert-reqs=3"], "--ssl-cert-reqs 3"),
        (["--ssl-certfile=/nowhere/x"], "No such file"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        take_tls(flags)
