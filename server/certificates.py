"""The coordinator's own certificate authority, and the certificate that its SuperLink shows to sites.

A public authority would vouch for a name to anybody; sites are told of one coordinator, and trust its authority alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmix.deployment.environment import LOOPBACK
from fedmix.errors import ConfigError
from server.home import Home

CA_DAYS, SERVER_DAYS = 3650, 397
RENEW_DAYS = 30  # so long before its end a server's certificate is issued anew when the coordinator starts
SLACK = datetime.timedelta(days=1)  # a site's clock may be behind


def make_authority(home: Home, host: str) -> None:
    """Write ca.crt and ca.key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _named(f"fedmix coordinator {host}"[:64])
    builder = _certificate(name, name, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    write_private(home.ca_key, _pem(key))
    home.ca_certificate.write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def issue(home: Home, host: str) -> None:
    """Write server.crt and server.key for a host, and for this machine under its loopback names."""
    authority, signer = _load(home)
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _certificate(_named(host[:64]), authority.subject, key.public_key(), signer.public_key(), SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = [_alternative(name) for name in dict.fromkeys([host, "localhost", LOOPBACK])]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    write_private(home.key, _pem(key))
    home.certificate.write_bytes(builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def renew(home: Home, host: str, *, now: datetime.datetime) -> bool:
    """Issue the server's certificate anew if it ends soon or is for another host; whether it was."""
    held = x509.load_pem_x509_certificate(home.certificate.read_bytes())
    names = held.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if held.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS) and _alternative(host) in names:
        return False
    issue(home, host)
    return True


def expires(path: Path) -> datetime.datetime:
    """When a certificate ends."""
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc


def write_private(path: Path, content: bytes) -> None:
    """Write what only its owner may read, from the first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _load(home: Home) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        authority = x509.load_pem_x509_certificate(home.ca_certificate.read_bytes())
        signer = serialization.load_pem_private_key(home.ca_key.read_bytes(), password=None)
    except (OSError, ValueError):
        raise ConfigError(f"ca.crt or ca.key in {home.folder} cannot be read; put them back from your copy") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != authority.public_key():
        raise ConfigError(f"ca.key in {home.folder} is not the key of ca.crt; put them back from your copy")
    return authority, signer


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - SLACK).not_valid_after(now + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
