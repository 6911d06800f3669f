"""Why a receiver could not be reached over TLS, in words, with the way out."""

from __future__ import annotations

import ssl

UNKNOWN_SIGNERS = {18, 19, 20, 21}
"""X509_V_ERR_*: signed by itself, or by what is not trusted. `man openssl-verification-options`."""


def tls_trouble(error: BaseException | None) -> str | None:
    """Of an error while a TLS connection was made; libraries wrap the cause in errors of their own.

    None if it has nothing to do with TLS.
    """
    while error is not None and not isinstance(error, (ssl.SSLError, ConnectionResetError)):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"its certificate is not trusted: {error.verify_message}"
        if error.verify_code in UNKNOWN_SIGNERS:
            text += "; name a file with the certificate to trust in the variable SSL_CERT_FILE"
        return text
    reason = getattr(error, "reason", None) or error.strerror or str(error)
    reason = str(reason).replace("_", " ").lower()
    return f"no TLS connection: {reason}; does it speak TLS on this port?"
