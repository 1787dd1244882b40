"""Standard Webhooks: the headers by which a receiver knows who sent a delivery, that it is whole, and that it is new.
Pure: the instant is given, and nothing is sent or read here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from hashlib import sha256

from factmesh.errors import SettingsError

PREFIX = "whsec_"
KEY_BYTES_MIN, KEY_BYTES_MAX = 16, 64
"""The specification asks for 24 to 64; shorter ones that are in use elsewhere are let in down to 16."""


def key_of(secret: str, where: str = "") -> bytes:
    """The signing key of `whsec_BASE64`. Raises SettingsError, without the secret in its text."""
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
        raise SettingsError(
            "the webhook secret is not one",
            where=where,
            hint=f"{PREFIX} and base64 of {KEY_BYTES_MIN} to {KEY_BYTES_MAX} random bytes",
        )
    return key


def headers(key: bytes, webhook_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """`webhook-id`, `webhook-timestamp`, `webhook-signature` (v1) of one attempt; repeats keep the id."""
    signed = f"{webhook_id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, sha256).digest()).decode()
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": f"v1,{signature}",
    }
