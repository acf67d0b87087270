"""Signatures of manifests: ECDSA over P-256 with SHA-256, DER, base64 on one line in manifest.json.sig.

Nothing of our own, so that a version can be signed and checked without Headrace, by `openssl dgst -sha256`. The manifest holds
the digest of every file, hence its signature covers the version. Needs the extra `sign`. Blocking.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

_MISSING = "signatures need the package cryptography: pip install 'headrace[sign]'"


def load_private_key(path: Path) -> EllipticCurvePrivateKey:
    """Raises ConfigError; never with anything of the file's content."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise ConfigError(_MISSING) from None
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except TypeError:
        raise ConfigError(f"{path}: expected a private key without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: expected a PEM file with a private key on the curve P-256") from None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise ConfigError(f"{path}: expected a private key on the curve P-256, got another kind of key")
    return key


def sign(raw: bytes, key: EllipticCurvePrivateKey) -> bytes:
    """The content of manifest.json.sig."""
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    return base64.b64encode(key.sign(raw, ECDSA(SHA256()))) + b"\n"


def check_signature(raw: bytes, signature: bytes, public_key: bytes, place: str, key_name: str) -> None:
    """Raises LoadError unless `signature` (the content of `place`) was made over `raw` by the owner of `public_key` (PEM)."""
    key = _load_public_key(public_key, key_name)
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        key.verify(base64.b64decode(b"".join(signature.split()), validate=True), raw, ECDSA(SHA256()))
    except binascii.Error:
        raise LoadError(f"{place}: expected a base64 text") from None
    except InvalidSignature:
        raise LoadError(f"{place}: not a signature of this manifest by {key_name}") from None


def _load_public_key(pem: bytes, name: str) -> EllipticCurvePublicKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise LoadError(_MISSING) from None
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise LoadError(f"signature_key {name}: expected a PEM file with a public key on the curve P-256") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise LoadError(f"signature_key {name}: expected a public key on the curve P-256, got another kind of key")
    return key
