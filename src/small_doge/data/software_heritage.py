"""Source files by their blob id from Software Heritage's public bucket, without an account."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

from ..errors import UserError

BUCKET, PREFIX, REGION = "softwareheritage", "content", "us-east-1"
CONNECTIONS = 32
"""Blobs that are fetched at a time."""

_MISSING = {"NoSuchKey", "404", "NotFound", "AccessDenied", "403"}  # S3 denies what may not be listed and is not there
_ATTEMPTS = 8


def fetcher() -> Callable[[str], str | None]:
    """A function that gives the text of a blob id, or None if it is not there; any number of threads may call it.

    botocore tries again where the network or the bucket fails, waiting longer each time. Bytes that are not UTF-8 are
    left out, as in the published python-edu.

    Raises:
        UserError: here if boto3 is not installed; from the function if the bucket cannot be reached in the end, or
            holds something that is not gzip.
    """
    try:
        import boto3
        import botocore
        import botocore.exceptions
        from botocore.config import Config
    except ImportError:
        raise UserError(
            'text from Software Heritage needs boto3; install it with `pip install "small-doge[smollm]"`'
        ) from None
    retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
    config = Config(signature_version=botocore.UNSIGNED, retries=retries, max_pool_connections=CONNECTIONS)
    client = boto3.client("s3", region_name=REGION, config=config)

    def fetch(blob: str) -> str | None:
        try:
            body = client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{blob}")["Body"].read()
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") in _MISSING:
                return None
            raise UserError(f"blob {blob} cannot be fetched from Software Heritage: {error}") from None
        except botocore.exceptions.BotoCoreError as error:
            raise UserError(
                f"Software Heritage's bucket cannot be reached for blob {blob} ({_ATTEMPTS} attempts): {error}"
            ) from None
        try:
            return gzip.decompress(body).decode("utf-8", errors="ignore")
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"blob {blob} of Software Heritage is not gzip: {error}") from None

    return fetch
