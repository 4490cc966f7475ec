"""Rebuild an average of another width after training, from the snapshots of a run.

    python examples/train_mpdit.py … --ema_stds 0.05 0.10 --ema_snapshot_steps 20000 --output_dir run
    python examples/reconstruct_ema.py run/ema_snapshots --ema_stds 0.03 0.075 0.15
    python examples/reconstruct_ema.py run/ema_snapshots --ema_stds 0.075 --output_dir run_0.075

The second line says how well each width can be rebuilt and writes nothing. The third writes a pipeline,
`MPDiTPipeline.from_pretrained("run_0.075")`. Needs the memory of two models, however many snapshots there are.
"""

import argparse
import shlex
from pathlib import Path

from diffusers_mp.arguments import HelpFormatter, at_least, check_ema_stds, ema_width
from diffusers_mp.scripts import ScriptParser, command_line, run_script


def make_parser() -> ScriptParser:
    parser = ScriptParser(
        description="Rebuild averages of other widths from the snapshots of a run.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("snapshots_dir", type=Path, help="ema_snapshots of a run")
    add("--ema_stds", type=ema_width, nargs="+", required=True, help="wanted widths, between 0 and 0.2887")
    add("--step", type=at_least(1), help="step of the average [that of the last snapshot]")
    add("--output_dir", type=Path, help="new folder of the pipeline; without it, the fit is shown only")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = make_parser().parse_args(argv)
    check_ema_stds(args.ema_stds, make_parser())
    if args.output_dir is not None and len(args.ema_stds) > 1:
        make_parser().error(f"--output_dir takes one pipeline, hence one of --ema_stds, got {args.ema_stds}")
    return args


if __name__ == "__main__":
    args = command_line(parse_args, make_parser())  # before the imports below, which take seconds

from diffusers_mp import reconstruct_ema
from diffusers_mp.averages.reconstruction import plan_reconstruction
from diffusers_mp.averages.snapshots import find_snapshots
from diffusers_mp.start_block import start_block


def main(args: argparse.Namespace) -> None:
    snapshots = find_snapshots(args.snapshots_dir)
    if not snapshots:
        make_parser().error(
            "snapshots_dir must hold folders like step-0001000_std-0.05, as ema_snapshots of a run with "
            f"--ema_snapshot_steps does, got {args.snapshots_dir}"
        )
    steps, stds = ({getattr(snapshot, name) for snapshot in snapshots} for name in ("step", "std"))
    stored, wanted = (", ".join(f"{std:g}" for std in widths) for widths in (sorted(stds), args.ema_stds))
    rows = {
        "data": f"{args.snapshots_dir}: {len(snapshots):,} snapshots of updates {min(steps):,} to {max(steps):,}, "
        f"widths {stored}",
        "wanted": f"{wanted} at update {args.step or max(steps):,}",
        "output": "none, the fit is shown" if args.output_dir is None else f"{args.output_dir}: a pipeline",
    }
    print(start_block(rows))
    for std in args.ema_stds:
        if args.output_dir is None:
            fit = plan_reconstruction(snapshots, std, args.step)
        else:
            fit = reconstruct_ema(args.snapshots_dir, args.output_dir, std, args.step)
        print(
            f"std {fit.std:g} at step {fit.step}: fit error {fit.fit_error:.2e} of the profile's norm, "
            f"{fit.fit_error_to_nearest:.2e} of the distance to {fit.nearest_snapshot}; {len(fit.weights)} snapshots, "
            f"absolute weights add up to {fit.amplification:.2f}"
        )
    if args.output_dir is not None:
        print(f"Saved the pipeline to {args.output_dir}: MPDiTPipeline.from_pretrained({str(args.output_dir)!r})")
        evaluate = ["--pretrained_model_name_or_path", str(args.output_dir), "--reference_dir", "photos"]
        print(f"Next, how good it is: {shlex.join(['python', 'examples/evaluate.py', *evaluate])}")
    else:
        widths = " ".join(f"{std:g}" for std in args.ema_stds[:1])
        command = ["python", "examples/reconstruct_ema.py", str(args.snapshots_dir), "--ema_stds", widths]
        print(f"Nothing was written. Next, a pipeline: {shlex.join([*command, '--output_dir', f'run_{widths}'])}")


if __name__ == "__main__":
    run_script(main, args, make_parser())
