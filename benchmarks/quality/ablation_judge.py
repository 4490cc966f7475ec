"""The judge of ablate.py: a small network that reads digits, and the Fréchet distance in its features."""

import numpy as np
import torch
from safetensors.torch import load_file
from shared import demo
from torch import nn

from diffusers_mp import frechet_distance
from diffusers_mp.evaluation.frechet import RunningStatistics


class Judge(nn.Module):
    """A small convolutional network: uint8 images, (B, C, H, W), to 32 features and logits of ten classes."""

    NUM_FEATURES = 32

    def __init__(self, num_channels=1, size=8):
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Conv2d(num_channels, 32, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                nn.SiLU(),
            ),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * (size // 2) ** 2, self.NUM_FEATURES), nn.SiLU()),
        )
        self.head = nn.Linear(self.NUM_FEATURES, len(demo.CLASS_NAMES))

    def forward(self, images):
        features = self.body(images.float() / 127.5 - 1)
        return features, self.head(features)


def fit_judge(images, labels, num_steps):
    """The judge of images that no generative model sees, each moved by up to a pixel."""
    torch.manual_seed(0)
    judge = Judge(*images.shape[1:3]).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        chosen = torch.randint(len(images), (64,))
        down, across = torch.randint(-1, 2, (2,)).tolist()
        moved = torch.roll(nn.functional.pad(images[chosen], (1, 1, 1, 1)), (down, across), (2, 3))[..., 1:-1, 1:-1]
        loss = nn.functional.cross_entropy(judge(moved)[1], labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def load_judge(folder):
    judge = Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval()


@torch.no_grad()
def facts_of_judge(judge, images, labels, num_splits=20):
    """What the judge reads in real digits, and the distance between halves of them."""
    features, logits = judge(images)
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randperm(len(images), generator=generator).chunk(2) for _ in range(num_splits)]
    return {
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),
        "num_real": len(images),
        "floor": float(np.mean([distance(features[one], features[other]) for one, other in halves])),
    }


def distance(features, others):
    """Fréchet distance between two sets of features."""
    one, other = RunningStatistics().update(features), RunningStatistics().update(others)
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
