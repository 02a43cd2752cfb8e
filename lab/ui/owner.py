"""Who is asking: an unguessable, signed token in a cookie that scripts cannot read.

A browser gets the cookie with the page. Every handler and file route asks `owner_of(request)` and passes the
answer to the store, which knows comparisons by owner. Nobody can make up a token (HMAC with a secret that lies
under LAB_HOME, mode 0600), and a request without one has no owner: it sees nothing and starts nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from lab.errors import LabError

COOKIE = "nora_owner"
YEAR_S = 365 * 24 * 3600
NO_OWNER = (
    "This browser did not send the page's cookie, so the lab cannot tell whose runs these are: "
    "allow cookies for this site (or open it in a tab of its own) and reload."
)


def secret(home: Path) -> bytes:
    """The key that signs tokens: 32 random bytes in `home/secret`, made on first use, readable by its user only."""
    path = home / "secret"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        # mkstemp makes the file 0600; a link that fails because another process was faster is as good.
        handle, temporary = tempfile.mkstemp(dir=home, prefix=".secret")
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            Path(temporary).unlink()
    return path.read_bytes()


class Owners:
    """Makes and checks tokens with one key."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def _sign(self, owner: str) -> str:
        digest = hmac.new(self.key, b"owner:" + owner.encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

    def new(self) -> str:
        """A token of a new owner, as the cookie holds it: "<owner>.<signature>"."""
        owner = secrets.token_urlsafe(24)
        return f"{owner}.{self._sign(owner)}"

    def check(self, token: str | None) -> str | None:
        """The owner that this token proves, or None."""
        owner, _, signature = (token or "").partition(".")
        genuine = hmac.compare_digest(self._sign(owner).encode(), signature.encode("utf-8", "replace"))
        return owner if owner and genuine else None

    def of(self, request: Any) -> str | None:
        """The owner whose cookie this request (gr.Request or Starlette's) carries, or None."""
        raw = getattr(request, "request", None) or request  # gr.Request wraps Starlette's
        return self.check((getattr(raw, "cookies", None) or {}).get(COOKIE))


_owners: Owners | None = None


def use(owners: Owners) -> None:
    """Set whose key `owner_of` checks with; the page does it once at its start."""
    global _owners
    _owners = owners


def owner_of(request: Any) -> str:
    """The owner of a request. Raises LabError when it carries no valid token."""
    owner = _owners.of(request) if _owners else None
    if owner is None:
        raise LabError(NO_OWNER)
    return owner


class OwnerCookie:
    """ASGI middleware: a page (GET of HTML) without a valid token gets one; other sites' posts are refused.

    The cookie is HttpOnly and SameSite=Lax. On Spaces the page lives in another site's iframe, where only
    SameSite=None; Secure; Partitioned works; Sec-Fetch-Site, which browsers set and scripts cannot, then keeps
    other sites from posting with it.
    """

    def __init__(self, app: Any, owners: Owners, *, framed: bool = False) -> None:
        self.app, self.owners, self.framed = app, owners, framed

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and headers.get("sec-fetch-site") == "cross-site":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Requests from other sites are refused."})
            return
        known = self.owners.check(token_of(headers))
        cookie = None if known or scope["method"] != "GET" else self._cookie(self._secure(scope, headers))

        async def add_cookie(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and cookie:
                given = list(message.get("headers", []))
                if any(k.lower() == b"content-type" and v.startswith(b"text/html") for k, v in given):
                    message = {**message, "headers": [*given, (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, add_cookie)

    def _secure(self, scope: dict[str, Any], headers: Mapping[str, str]) -> bool:
        return scope.get("scheme") == "https" or headers.get("x-forwarded-proto", "").split(",")[0].strip() == "https"

    def _cookie(self, secure: bool) -> str:
        flags = "SameSite=Lax" + ("; Secure" if secure else "")
        if self.framed and secure:
            flags = "SameSite=None; Secure; Partitioned"
        return f"{COOKIE}={self.owners.new()}; Path=/; Max-Age={YEAR_S}; HttpOnly; {flags}"


def token_of(headers: Mapping[str, str]) -> str | None:
    """The token in a request's headers (names in lower case), not yet checked."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return found.value if found else None
