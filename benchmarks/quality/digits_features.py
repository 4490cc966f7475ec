"""Features of digits for evaluate.py, where no network can be downloaded.

    PYTHONPATH=benchmarks/quality python examples/evaluate.py --extractors digits_features:hidden_units ...

    python benchmarks/quality/digits_features.py

prints what real digits score: how well the classifier behind the features reads those that it was not fitted on, and
their Fréchet distance from other real ones, which a perfect model would have too.
"""

import functools

import torch
from shared import demo
from sklearn.neural_network import MLPClassifier

from diffusers_mp import frechet_distance
from diffusers_mp.evaluation.frechet import RunningStatistics


@functools.cache
def classifier():
    """A network with 16 hidden units, fitted on the `judge` part of the digits, which no generative model has seen.

    Returns:
        sklearn.neural_network.MLPClassifier: of `demo.features`; the same each time, with the same scikit-learn.
    """
    judge = demo.split_digits()["judge"]
    network = MLPClassifier((16,), solver="lbfgs", alpha=0.1, max_iter=2000, random_state=0)
    return network.fit(demo.features(judge.images), judge.labels)


def hidden_units(images):
    """What the hidden units make of images.

    Args:
        images (torch.Tensor): uint8, shape (B, 3, H, W), H and W at least 8.
    Returns:
        torch.Tensor: float64, shape (B, 16), not negative.
    """
    network = classifier()
    grey = images.double().mean(dim=1, keepdim=True) / 255
    pixels = torch.nn.functional.adaptive_avg_pool2d(grey, demo.SCAN_SIZE).flatten(1)
    weight, bias = torch.from_numpy(network.coefs_[0]), torch.from_numpy(network.intercepts_[0])
    return (pixels @ weight.to(pixels) + bias.to(pixels)).relu()


def main():
    splits = demo.split_digits()
    real, others = splits["held_out"], splits["train"]
    read = classifier().predict(demo.features(real.images)) == real.labels
    statistics = []
    for part in (real, others):
        pixels = torch.from_numpy(demo.features(part.images) * 255).round().to(torch.uint8).view(-1, 1, 8, 8)
        statistics.append(RunningStatistics().update(hidden_units(pixels.expand(-1, 3, -1, -1))))
    first, second = statistics
    distance = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    print(f"held-out digits that the classifier reads: {read.mean():.1%} of {len(read)}")
    print(f"Fréchet distance of the {second.count} training digits from the {first.count} held out: {distance:.4g}")


if __name__ == "__main__":
    main()
