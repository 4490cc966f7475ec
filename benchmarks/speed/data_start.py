"""Time and memory to start on a folder of many small images: opened, encoded, and started on again.

    python benchmarks/speed/data_start.py --num_images 10000 100000

The folder has that many PNGs of 8x8 pixels in ten classes; they are kept as pixels, so that little is timed but the
handling of files and rows. Each step runs in its own process, which has imported everything before it is timed:

    open     the folder for the first time
    encode   that folder, opened anew
    start    the same once all is encoded, as a run that is resumed does

Prints Markdown; asserts nothing. `PYTHONPATH` names another copy of the package to measure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


STEPS = ("open", "encode", "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, nargs="+", default=[10_000, 100_000])
    arguments = parser.parse_args()

    measured = {}
    for num_images in arguments.num_images:
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder) / "images", num_images)
            for step in STEPS:
                command = [sys.executable, __file__, "--measure", step, folder]
                # A process of its own for each: memory once taken would count for all that follow.
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                measured[num_images, step] = json.loads(printed.splitlines()[-1])

    print("# Start on a folder of many small images\n")
    sizes = " ".join(map(str, arguments.num_images))
    print(f"- command: `python benchmarks/speed/data_start.py --num_images {sizes}`")
    print(f"- {os.cpu_count()} cores\n")
    print("| images | step | seconds | of them opening | of the processor | peak memory, MiB | since imports |")
    print("|---|---|---|---|---|---|---|")
    for (num_images, step), result in measured.items():
        times = " | ".join(f"{result[name]:.2f}" for name in ("seconds", "opening", "of_processor"))
        memory = f"{result['peak']:.0f} | {result['peak'] - result['imported']:.0f}"
        print(f"| {num_images:,} | {step} | {times} | {memory} |")
    first, last = arguments.num_images[0], arguments.num_images[-1]
    for step in STEPS:
        growth = measured[last, step]["of_processor"] / measured[first, step]["of_processor"]
        print(f"\n{last / first:g} times the images take {growth:.1f} times as much of the processor to {step}.")


def make_images(folder: Path, num_images: int) -> None:
    """PNGs of noise in ten classes; a hundred of them differ."""
    import io

    import numpy as np
    from PIL import Image

    contents, rng = [], np.random.default_rng(0)
    for _ in range(100):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "png")
        contents.append(file.getvalue())
    for name in range(10):
        (folder / f"class_{name}").mkdir(parents=True)
    for number in range(num_images):
        (folder / f"class_{number % 10}" / f"{number:06}.png").write_bytes(contents[number // 10 % 100])


def measure(step: str, folder: Path) -> None:
    """Do one step, and print what it took."""
    from diffusers_mp.data.encoding import encode_dataset
    from diffusers_mp.data.images import load_image_dataset
    from diffusers_mp.data.settings import EncodingSettings

    imported, started, started_on_processor = memory_of("VmRSS"), time.perf_counter(), time.process_time()
    source = load_image_dataset(folder / "images", cache_dir=str(folder / "cache"))
    opening = time.perf_counter() - started
    if step != "open":
        encode_dataset(source[0], folder / "encoded", EncodingSettings(8), vae=None, id2label=source[1])
    result = {"seconds": time.perf_counter() - started, "opening": opening}
    result["of_processor"] = time.process_time() - started_on_processor
    print(json.dumps({**result, "imported": imported, "peak": memory_of("VmHWM")}))


def memory_of(name: str) -> float:
    """Memory of this process in MiB: `VmRSS` now, `VmHWM` at most."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:")) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
