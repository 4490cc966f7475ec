"""Cost of a MagnitudeRecorder and of a NormWatch: updates with and without, taking turns in one process, and counted.

    python benchmarks/speed/recorder_cost.py --size S/2 --batch_size 16

One model, one optimiser. A round times an update without a recorder, one that is recorded, and one with a recorder
that rests, as between two records. What a record costs more than a plain update, divided by the stride, is the cost of
training with it. Of a NormWatch operators and bytes are counted, which no other work on the machine changes. Prints
Markdown; asserts nothing.
"""

import argparse
import statistics

import torch
from facts import facts_of_run, head
from operations import CountedOperators
from timing import spread, take_turns

from diffusers_mp import (
    MagnitudeRecorder,
    MPDiTTransformer2DModel,
    NormWatch,
    get_preset,
    normalize_weights_,
    parameter_groups,
    trust_rows_,
)


DEFAULT_STRIDE, WATCH_STRIDE = 100, 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", help="preset, such as S/2")
    parser.add_argument("--configuration", default="E")
    parser.add_argument("--batch_size", type=int, default=16, help="latents of 4x16x16 per update")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = MPDiTTransformer2DModel(**get_preset(arguments.size, arguments.configuration)).to(device).train()
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-2))
    latents = torch.randn(arguments.batch_size, 4, 16, 16, device=device)
    timestep = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    class_labels = torch.randint(0, 1000, (arguments.batch_size,), device=device)

    def update():
        prediction = model(latents, timestep=timestep, class_labels=class_labels).sample
        (prediction - latents).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)

    # Rests: its next record is out of reach.
    resting = MagnitudeRecorder(model, optimizer, stride=10**9, num_updates=1)

    def update_with_resting_recorder():
        update()
        resting.step()

    def recorded_update():
        recorder = MagnitudeRecorder(model, optimizer)
        update()
        recorder.step()

    times = take_turns(
        {"without": update, "resting": update_with_resting_recorder, "recorded": recorded_update}, arguments.rounds
    )
    without = statistics.median(times["without"])
    print("# Cost of recording magnitudes\n")
    print(head(facts_of_run(device)))
    print(
        f"- {arguments.size} in {arguments.configuration}, batches of {arguments.batch_size} latents of 4x16x16, "
        f"{arguments.rounds} rounds; an update without takes {without * 1000:.1f} ms (median)\n"
    )
    print("| more than the update without, of the same round | quartile | median | quartile |")
    print("|---|---|---|---|")
    for name, label, stride in (
        ("resting", "with a recorder that rests", 1),
        ("recorded", "that is recorded, everything by default", 1),
        ("recorded", f"the same divided by the default stride {DEFAULT_STRIDE}", DEFAULT_STRIDE),
    ):
        extra = spread([(a / b - 1) / stride for a, b in zip(times[name], times["without"], strict=True)])
        print(f"| {label} | {extra['low']:.2%} | {extra['median']:.2%} | {extra['high']:.2%} |")

    # As in the trainer, whose rows are trusted: an update has fewer operators then.
    trust_rows_(model)
    with CountedOperators() as plain:
        update()
        update()
    watch = NormWatch(model, every=2, num_updates=2, warn=False)
    with CountedOperators() as watched:
        for _ in range(2):
            update()
            watch.step()
    watch.close()
    print("\n| NormWatch | operators | bytes |\n|---|---|---|")
    print(f"| an update without | {plain.number // 2} | {plain.num_bytes // 2 / 1e6:.0f} MB |")
    operators, num_bytes = watched.number - plain.number, watched.num_bytes - plain.num_bytes
    print(f"| more at a look | {operators} | {num_bytes / 1e6:.0f} MB |")
    shares = [
        2 * more / of_plain / WATCH_STRIDE
        for more, of_plain in ((operators, plain.number), (num_bytes, plain.num_bytes))
    ]
    print(f"| the same divided by the default stride {WATCH_STRIDE} | {shares[0]:.2%} | {shares[1]:.2%} |")


if __name__ == "__main__":
    main()
