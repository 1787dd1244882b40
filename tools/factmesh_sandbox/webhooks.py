"""Standard Webhooks: does a delivery carry a signature that its secret made, and is it fresh?
Pure: the instant is given, nothing is logged or answered here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from hashlib import sha256


def sign(secret: str, webhook_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` value (`v1,BASE64`) of a delivery."""
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret_key(secret), signed, sha256).digest()).decode()


def refusal(
    secret: str, headers: Mapping[str, str], body: bytes, *, now_epoch_s: float, tolerance_s: int
) -> str | None:
    """Why the delivery is not to be trusted, or None when it is."""
    webhook_id, stamp, signatures = (headers.get(f"webhook-{name}") for name in ("id", "timestamp", "signature"))
    if not webhook_id or not stamp or not signatures:
        return "webhook-id, webhook-timestamp and webhook-signature are all needed"
    if not (stamp.isascii() and stamp.isdigit()):
        return "webhook-timestamp is no number of seconds"
    if abs(now_epoch_s - int(stamp)) > tolerance_s:
        return f"webhook-timestamp is more than {tolerance_s} s away from now"
    wanted = sign(secret, webhook_id, int(stamp), body).encode()
    # A list, so that a secret can be rotated: any of them may match.
    if not any(hmac.compare_digest(wanted, given.encode()) for given in signatures.split(" ")):
        return "webhook-signature does not match"
    return None


def secret_key(secret: str) -> bytes:
    """The signing key of a secret `whsec_BASE64`; ValueError when it is none."""
    text = secret.removeprefix("whsec_")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_" if set("-_") & set(text) else None)
    except binascii.Error as error:
        raise ValueError("a webhook secret is whsec_ and base64") from error
