"""Whom a request asks, and whether a page of another site has made it: what every server for a browser looks at."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers


def asked_host(headers: Headers) -> str:
    """Return the name of the host that a request asks, without a port; "" where there is none."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def is_of_another_site(headers: Headers) -> bool:
    """Tell whether a request names an origin that is not the host which it asks."""
    asked = headers.get("host", "")
    return headers.get("origin") not in (None, f"http://{asked}", f"https://{asked}")
