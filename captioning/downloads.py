"""Downloads images from the web, with limits of time and size."""

import time

from huggingface_hub.utils import get_session

SCHEMES = ("http://", "https://")
TIME_LIMIT, SIZE_LIMIT = 30.0, 100 * 2**20
"""Seconds and bytes that the download of an image may take."""


def is_url(text: str) -> bool:
    return text.lower().startswith(SCHEMES)


def download(url: str, time_limit: float = TIME_LIMIT, size_limit: int = SIZE_LIMIT) -> bytes:
    """The content of a URL, at most `size_limit` bytes of it in at most `time_limit` seconds.

    Raises:
        ValueError: If it cannot be downloaded within the limits; the message says why.
    """
    end, chunks, size = time.monotonic() + time_limit, [], 0
    try:
        with get_session().stream("GET", url, timeout=time_limit, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > size_limit:
                    raise ValueError(f"it has more than {size_limit:,} bytes, the limit of a download")
                if time.monotonic() > end:
                    raise ValueError(f"its download takes more than {time_limit:g} s; raise --url-timeout")
    except ValueError:
        raise
    except Exception as error:  # the HTTP library of huggingface_hub and its exceptions differ between versions
        reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
        raise ValueError(f"it cannot be downloaded: {reason:.200}") from error
    return b"".join(chunks)
