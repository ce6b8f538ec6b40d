"""A file from the network: whole, or not there at all."""

import http.client
import os
import urllib.request
from contextlib import suppress

from tqdm import tqdm

from kit.base import files
from kit.base.errors import reason
from kit.data.tokens import sha256


def fetch(url, path, expected_sha256=''):
    """
    Download to a temporary name beside path, check length and hash, then rename. Two processes do so one after the
    other, and what is there by then is not fetched again. Raises OSError, leaves nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    lock = files.lock(path.parent, f'another process is downloading to {path.parent}: waiting for its end')
    try:
        if path.is_file():
            return
        print(f'downloading {url}')
        with urllib.request.urlopen(url, timeout=30) as answer, files.open_own(part, 'wb') as file:
            size = int(answer.headers.get('Content-Length', 0))
            with tqdm(total=size or None, unit='B', unit_scale=True, leave=False, disable=None) as bar:
                while chunk := answer.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if size and part.stat().st_size != size:
            raise OSError(f'it broke off after {part.stat().st_size:,} of {size:,} bytes')
        if expected_sha256 and (found := sha256(part)) != expected_sha256:
            raise OSError(f'what came has the sha256 {found[:12]}..., expected was {expected_sha256[:12]}...')
        os.replace(part, path)
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f'the answer broke off or is none ({reason(error)})') from None
    finally:
        part.unlink(missing_ok=True)
        (path.parent / '.lock').unlink(missing_ok=True)  # while it is held: who waits for it looks for another
        with suppress(OSError):  # not empty, where there is more than what did not come
            path.parent.rmdir()
        lock.close()
