"""Time and memory to prepare a batch of latents for a device, in one core, beside `torch.randn` of its size.

    python benchmarks/speed/feeding.py

Reads caches of a million latents of 4x16x16, and of as many bytes of 4x32x32. They are sparse files: reading them is
the file system's work of filling pages with zeros, not a disk's. A batch needs two normal numbers for each number of
its latents, noise and posterior draw, so that twice `torch.randn` of their size is what these alone take from one
generator, which knows no samples.

    randn    `torch.randn` of the latents' size
    draws    the random numbers of the batch, keyed by (seed, epoch, index)
    read     its posteriors and labels, gathered from the mapped shards
    batch    all of `TrainingSamples`: draws, read, standardised, labels dropped

All take turns on the same batches, which were read once before; `first` is the batch at that first reading, from
shards that were opened before. Milliseconds are the processor's. Prints Markdown; asserts nothing.
"""

import argparse
import json
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from facts import facts_of_run, head, table
from timing import ratio, share_taken, spread, take_turns

from diffusers_mp.data.draws import sample_draws
from diffusers_mp.data.latents import INDEX_NAME, LatentDataset, content_hash
from diffusers_mp.data.settings import FORMAT_VERSION
from diffusers_mp.training import StreamBatchSampler, TrainingSamples


SHARD_SIZE, NUM_CLASSES = 2048, 1000
NAMES = ("randn", "draws", "read", "batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_latents", type=int, default=1_000_000, help="of 4x16x16")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    rows, memory = [], []
    for side in arguments.sides:
        with tempfile.TemporaryDirectory() as folder:
            make_sparse_cache(Path(folder), arguments.num_latents * 256 // side**2, side)
            first, times, after = measure(folder, arguments.batch_size, arguments.rounds)
        cells = [f"{in_words(times[name])} ({ratio(times, name, 'randn')['median']:.1f})" for name in NAMES]
        rows.append([f"4x{side}x{side}", in_words(first), *cells])
        memory += [[f"4x{side}x{side}", f"{num_batches:,} batches", *sizes] for num_batches, sizes in after.items()]
    print("# Feeding\n")
    print(head(facts_of_run()))
    print(
        f"- {arguments.num_latents:,} latents of 4x16x16, batches of {arguments.batch_size}, {arguments.rounds} rounds"
    )
    print(f"- other virtual machines took at most {share_taken():.1%} of a round\n")
    print(
        "Milliseconds for a batch, median and quartiles; in brackets the median ratio to `randn` of the same round.\n"
    )
    print(table(["latents", "first", *NAMES], rows) + "\n")
    print(table(["latents", "after", "memory of the process, MiB", "mapped pages of files, MiB"], memory))


def make_sparse_cache(folder: Path, num_latents: int, side: int) -> None:
    """A finished data set of zeros that takes no room on the disk."""
    shards, shape = [], [4, side, side]
    for start in range(0, num_latents, SHARD_SIZE):
        count = min(SHARD_SIZE, num_latents - start)
        header, end = {}, 0
        for name, dtype, of_row in (("label", "I64", []), ("mean", "F32", shape), ("std", "F32", shape)):
            begin, end = end, end + count * int(np.prod(of_row)) * (8 if dtype == "I64" else 4)
            header[name] = {"dtype": dtype, "shape": [count, *of_row], "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        path = folder / f"shard-{len(shards):05d}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + end)
        num_bytes = path.stat().st_size
        shards.append({"name": path.name, "num_samples": count, "num_bytes": num_bytes, "sha256": ""})
    vae = {"id": "zeros", "latents": "posterior"}
    index = {"format_version": FORMAT_VERSION, "vae": vae, "random_flip": False, "skipped": []}
    index |= {"id2label": {str(id_): str(id_) for id_ in range(NUM_CLASSES)}, "pooled_projection_dim": None}
    index |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "latent_shape": shape}
    index |= {"num_samples": num_latents, "shards": shards}
    (folder / INDEX_NAME).write_text(json.dumps(index | {"content_hash": content_hash(index)}))


def measure(folder: str, batch_size: int, rounds: int) -> tuple[list[float], dict, dict]:
    """Seconds at the first reading, seconds in turns, and memory after so many batches."""
    latents = LatentDataset(folder)
    samples = TrainingSamples(latents, seed=0, num_classes=NUM_CLASSES, class_dropout_prob=0.1)
    sampler = StreamBatchSampler(len(samples), seed=0, train_batch_size=batch_size, max_train_steps=4 * rounds)
    shape = torch.Size((batch_size, *latents.latent_shape))
    latents.read_batch(*zip(*((index, False) for index in range(0, len(latents), SHARD_SIZE)), strict=True))
    memory, first, batches = {0: own_and_mapped_memory()}, [], []
    for number, keys in enumerate(sampler, start=1):
        start = time.thread_time()
        samples[keys]
        first.append(time.thread_time() - start)
        if number <= 20:
            batches.append(keys)
        if number in (rounds, 4 * rounds):
            memory[number] = own_and_mapped_memory()

    def draws(keys):
        epochs, indices = np.array(keys).T
        sample_draws(0, epochs, indices, shape[1:].numel())

    unflipped, number = [False] * batch_size, 0
    functions = {
        "randn": lambda keys: torch.randn(shape),
        "draws": draws,
        "read": lambda keys: latents.read_batch([index for _, index in keys], unflipped),
        "batch": lambda keys: samples[keys],
    }

    def next_batch(name):
        nonlocal number
        number += 1
        return batches[number % len(batches)]

    return first, take_turns(functions, rounds, prepare=next_batch, clock=time.thread_time), memory


def own_and_mapped_memory() -> tuple[int, int]:
    """Memory of this process alone, and pages of files that it has mapped, which are the system's to take; MiB."""
    with open("/proc/self/status") as status:
        sizes = dict(line.split(":") for line in status if line.startswith("Rss"))
    return tuple(int(sizes[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile"))


def in_words(seconds: list[float]) -> str:
    quartiles = {name: 1000 * value for name, value in spread(seconds).items()}
    return "{median:.2f} [{low:.2f}, {high:.2f}]".format(**quartiles)


if __name__ == "__main__":
    main()
