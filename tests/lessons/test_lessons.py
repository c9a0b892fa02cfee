"""The lessons: their gradients against differences and against torch's, and that they learn what they say."""

import gzip
import io
import re
import sys
import threading
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import digits
from conftest import script, tiny_model
from digits import FOLDER, Network, mnist, numbers
from glyphgpt.data.downloads import RemoteFile, fetch
from glyphgpt.errors import UserError
from glyphgpt.settings import Optimization
from glyphgpt.training.optimizers import make_optimizers, set_learning_rate
from gpt import GPT, AdamW, Array, Arrays, Ids, cross_entropy, new_parameters
from model import GPT as TorchGPT

SHAPES = st.tuples(*(st.integers(1, most) for most in (3, 8, 3, 3, 5, 9)))
"""B, T, layers, H, D, V."""


def both(shape: tuple[int, ...], seed: int) -> tuple[TorchGPT, GPT, Ids, Ids]:
    """model.py's network and the lesson's with the same weights, none of them 0 or 1, tokens and targets."""
    B, T, L, H, D, V = shape
    theirs = tiny_model(vocab_size=V, n_layer=L, n_head=H, n_embd=H * D).double()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(random.normal(0, 0.7, parameter.shape)))
    ours = GPT({name: weight.numpy().copy() for name, weight in theirs.state_dict().items()}, L, H)
    tokens = random.integers(0, V, (2, B, T))
    return theirs, ours, tokens[0], tokens[1]


def torch_loss(model: TorchGPT, tokens: Ids, targets: Ids) -> tuple[Tensor, Tensor]:
    """Return model.py's loss in float64, where the model itself would round it to float32, and its logits."""
    logits = model(torch.from_numpy(tokens))
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()), logits


def furthest(ours: Arrays, theirs: dict[str, Tensor]) -> float:
    """Return the largest difference between arrays of the same names and shapes."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    return max(float(np.abs(ours[name] - theirs[name].numpy()).max()) for name in ours)


@given(shape=SHAPES, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_logits_loss_and_every_gradient_are_those_of_model_py(shape: tuple[int, ...], seed: int) -> None:
    theirs, ours, tokens, targets = both(shape, seed)
    wanted_loss, wanted_logits = torch_loss(theirs, tokens, targets)
    torch.autograd.backward(wanted_loss)
    logits = ours.forward(tokens)
    loss, dlogits = cross_entropy(logits, targets)
    assert np.abs(logits - wanted_logits.detach().numpy()).max() < 1e-9
    assert abs(loss - wanted_loss.item()) < 1e-9
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert furthest(ours.backward(dlogits), wanted) < 1e-9


@given(shape=SHAPES.filter(lambda shape: shape[4] > 2), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_ten_steps_of_training_stay_with_those_of_model_py(shape: tuple[int, ...], seed: int) -> None:
    theirs, ours, tokens, targets = both(shape, seed)
    optimization = Optimization(weight_decay=0.3, beta1=0.8, beta2=0.95)
    optimizers, optimizer = make_optimizers(theirs, optimization), AdamW(0.8, 0.95, 0.3)
    for step in range(1, 11):
        rate = 0.01 / step
        wanted, _ = torch_loss(theirs, tokens, targets)
        torch.autograd.backward(wanted)
        set_learning_rate(optimizers, rate)
        for one in optimizers:
            one.step()
        theirs.zero_grad()
        loss, dlogits = cross_entropy(ours.forward(tokens), targets)
        assert abs(loss - wanted.item()) < 1e-9
        optimizer.update(ours.p, ours.backward(dlogits), rate)
    # Some gradients are 0 but for rounding: those of the keys' biases, which add the same to all scores of a query.
    # AdamW divides them by their size and 1e-8, and so makes steps of them that loss and logits do not feel.
    assert furthest(ours.p, {name: p.detach() for name, p in theirs.named_parameters()}) < 1e-7


def test_new_parameters_are_those_that_model_py_begins_with() -> None:
    wanted = tiny_model(vocab_size=50, block_size=40, n_layer=3, n_embd=64).state_dict()
    ours = new_parameters(50, 40, 3, 64, np.random.default_rng(0))
    assert {name: p.shape for name, p in ours.items()} == {name: tuple(p.shape) for name, p in wanted.items()}
    for name, p in ours.items():
        assert p.std() == pytest.approx(wanted[name].std(correction=0).item(), rel=0.1), name
        assert p.mean() == pytest.approx(wanted[name].mean().item(), abs=2e-3), name


def test_the_gpt_learns_a_text(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    flags = ["--steps=120", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--learning_rate=1e-2"]
    done = script("lessons/gpt.py", str(tmp_path / "my.txt"), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    losses = [float(loss) for loss in re.findall(r"loss (\S+) nats", done.stdout)]
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert "the cat sat on the mat. the cat sat on the mat." in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lessons/gpt.py", "none.txt"], "none.txt: No such file"),
        (["lessons/gpt.py", "--n_head=3"], "n_embd must be a multiple of n_head"),
        (["lessons/gpt.py", "--learning_rate=1e300"], "try a smaller --learning_rate"),
        (["lessons/gpt.py", "--learning_rate=nan"], "learning rate must be above 0"),
        (["lessons/gpt.py", "--block_size=30000"], "it takes more than --block_size=30000"),
        (["lessons/digits.py", "--epochs=0"], "epochs and learning rate must be above 0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(words: list[str], said: str) -> None:
    done = script(*words)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    done = script("lessons/gpt.py", str(tmp_path / "picture.png"))
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {tmp_path / 'picture.png'}: not a text in UTF-8; name another\n",
    )


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    B=st.integers(1, 5),
    cost=st.sampled_from(["cross-entropy", "quadratic"]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_backprop_agrees_with_finite_differences(sizes: list[int], B: int, cost: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    network = Network(sizes, cost, seed)
    network.biases = [random.normal(size=b.shape) for b in network.biases]
    x, y = random.random((B, sizes[0])), random.random((B, sizes[-1]))
    d_biases, d_weights = network.backprop(x, y)
    for parameters, gradients in ((network.biases, d_biases), (network.weights, d_weights)):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient == pytest.approx(slopes(parameter, lambda: network.cost(x, y)), abs=1e-8)


def slopes(parameter: Array, cost: Any, h: float = 1e-5) -> Array:
    """Measure how the cost changes with each number of a parameter, from a little below it to a little above."""
    found = np.zeros_like(parameter)
    for place in np.ndindex(parameter.shape):
        kept = parameter[place]
        parameter[place] = kept + h
        above = cost()
        parameter[place] = kept - h
        found[place] = (above - cost()) / (2 * h)
        parameter[place] = kept
    return found


def test_a_mini_batch_goes_one_step_down_the_slope() -> None:
    network = Network((3, 4, 2))
    x, y = np.random.default_rng(0).random((2, 5, 3))[0], np.eye(2)[[0, 1, 1, 0, 1]]
    before, gradients = [*network.biases, *network.weights], network.backprop(x, y)
    cost = network.cost(x, y)
    network.update_mini_batch(x, y, 0.1)
    for after, old, d in zip([*network.biases, *network.weights], before, [*gradients[0], *gradients[1]], strict=True):
        np.testing.assert_allclose(after, old - 0.1 * d, rtol=1e-14)
    assert network.cost(x, y) < cost


@pytest.mark.parametrize("flags", [[], ["--cost=quadratic", "--learning_rate=3"]], ids=["cross-entropy", "quadratic"])
def test_the_network_reads_digits(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["digits.py", *flags])
    digits.main()
    told = capsys.readouterr().out
    assert "layer 1, σ(a Wᵀ + b): (10, 64) @ (64, 30) + (30,) = (10, 30)" in told
    shares = [float(share) for share in re.findall(r"(\S+)% of those", told)]
    assert len(shares) == 10
    assert shares[-1] >= 95


def test_without_scikit_learn_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"^this lesson without --mnist needs scikit-learn: pip install scikit-learn$"):
        digits.small_digits()


def idx(*sizes: int) -> bytes:
    """Return an idx file that counts up."""
    head = bytes((0, 0, 8, len(sizes))) + b"".join(size.to_bytes(4, "big") for size in sizes)
    return head + bytes(range(np.prod(sizes)))


def packed(members: dict[str, bytes]) -> bytes:
    """Return a zip of these files."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return archive.getvalue()


SDIST = packed({"setup.py": b"raise SystemExit", f"{FOLDER}/some-idx3.gz": gzip.compress(idx(2, 3, 4))})
SOURCE = RemoteFile(
    file="carrier.pigeon-1.0.zip",
    sha256=sha256(SDIST).hexdigest(),
    url="https://127.0.0.1:9/carrier.zip",  # where nobody answers
    project="carrier-pigeon",
)
PAGE = b"""<html><a href="../../files/carrier_pigeon-1.0-py3-none-any.whl">a wheel</a>
<a href="../../files/carrier.pigeon-0.9.zip">another</a>
<a data-requires-python="&gt;=3" href="../../files/carrier.pigeon-1.0.zip#sha256=12">the one</a></html>"""


class Index:
    """A package index on this machine: what it has, whom it lets in, and what it was asked for."""

    def __init__(self) -> None:
        self.files = {"/simple/carrier-pigeon/": PAGE, "/files/carrier.pigeon-1.0.zip": SDIST}
        self.login: str | None = None
        self.asked: list[str] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.asked.append(self.path)
                allowed = self.headers["Authorization"] == index.login
                self.send_response(401 if not allowed else 200 if self.path in index.files else 404)
                self.end_headers()
                self.wfile.write(index.files.get(self.path, b"") if allowed else b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.place = f"127.0.0.1:{self.server.server_port}/simple"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Serve such an index, and have pip's environment variable point to it."""
    served = Index()
    threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{served.place}/")
    monkeypatch.setenv("no_proxy", "*")
    yield served
    served.server.shutdown()
    served.server.server_close()


def failure(source: RemoteFile, data_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch(source, data_dir)
    assert list((data_dir / "downloads").iterdir()) == []
    [line] = str(caught.value).splitlines()
    return line


def test_an_sdist_comes_from_the_users_index_once_and_only_the_member_is_read(tmp_path: Path, index: Index) -> None:
    path = fetch(SOURCE, tmp_path)
    assert path.read_bytes() == SDIST
    assert fetch(SOURCE, tmp_path) == path
    assert index.asked == ["/simple/carrier-pigeon/", "/files/carrier.pigeon-1.0.zip"]
    with zipfile.ZipFile(path) as archive:
        assert numbers(archive, "some-idx3").tolist() == list(range(24))
    assert [found.name for found in tmp_path.rglob("*")] == ["downloads", "carrier.pigeon-1.0.zip"]


def test_an_index_of_pips_settings_is_asked(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = http://{index.place}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert fetch(SOURCE, tmp_path).read_bytes() == SDIST


def test_a_login_in_the_indexs_address_is_used_and_never_shown(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.login = "Basic bWU6c0BjcmV0"  # me:s@cret
    assert "the package index: Unauthorized" in failure(SOURCE, tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s%40cret@{index.place}")
    assert fetch(SOURCE, tmp_path).read_bytes() == SDIST
    other = SOURCE.model_copy(update={"project": "nobody", "file": "other.zip"})
    with pytest.raises(UserError) as caught:
        fetch(other, tmp_path)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "0" * 64}, "the package index: the file has the wrong checksum"),
        ({"file": "carrier.pigeon-2.0.zip"}, "the package index: carrier-pigeon has no file carrier.pigeon-2.0.zip"),
        ({"project": "carrier-dove"}, "the package index: Not Found"),
    ],
    ids=["checksum", "file", "project"],
)
def test_an_sdist_that_cannot_be_had(tmp_path: Path, index: Index, change: dict[str, str], said: str) -> None:
    line = failure(SOURCE.model_copy(update=change), tmp_path)
    assert said in line
    assert "download that URL yourself and save it as" in line
    assert index.asked[0].startswith("/simple/carrier-")


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:9", "http://[", "http://127.0.0.1:port"])
def test_an_index_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    assert "cannot download carrier.pigeon-1.0.zip: the package index: " in failure(SOURCE, tmp_path)


def test_mnist_is_the_well_known_one() -> None:
    try:
        (images, labels), (others, answers) = mnist()
    except UserError as reason:
        assert "checksum" not in str(reason)
        pytest.skip(str(reason))
    assert (images.shape, labels.shape, others.shape, answers.shape) == (
        (60_000, 784),
        (60_000,),
        (10_000, 784),
        (10_000,),
    )
    assert (images.min(), images.max()) == (0, 1)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(answers).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
