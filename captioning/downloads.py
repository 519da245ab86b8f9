"""Downloads images from the web, with limits of time and size."""

import time

from huggingface_hub.utils import get_session

from vlv.errors import first_line

from .choices import SIZE_LIMIT, TIME_LIMIT


def download(url: str, time_limit: float = TIME_LIMIT) -> bytes:
    """The content of a URL, at most `SIZE_LIMIT` bytes of it in at most `time_limit` seconds.

    Raises:
        ValueError: If it cannot be downloaded within the limits; the message says why.
    """
    session, chunks, size = get_session(), [], 0
    end = time.monotonic() + time_limit
    try:
        with session.stream("GET", url, timeout=time_limit, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                size += len(chunk)
                if size > SIZE_LIMIT:
                    raise ValueError(f"it has more than {SIZE_LIMIT:,} bytes, the limit of a download")
                if time.monotonic() > end:
                    raise ValueError(f"its download takes more than {time_limit:g} s; raise --url-timeout")
    except ValueError:
        raise
    except Exception as error:  # the HTTP library of huggingface_hub and its exceptions differ between versions
        raise ValueError(f"it cannot be downloaded: {first_line(error):.200}") from error
    return b"".join(chunks)
