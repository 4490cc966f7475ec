"""Turn a DiT checkpoint of the original release into a pipeline folder for diffusers, and show that it predicts alike.

    python examples/convert_dit.py --checkpoint_path DiT-XL-2-256x256.pt --output_dir dit-xl-2-256

    import diffusers_mp  # known to diffusers from here on
    pipeline = DiTPipeline.from_pretrained("dit-xl-2-256")

Takes the released files and what the original `train.py` saves, whose averaged weights are used. Files are read as
weights only: no code in them is run. Size, patch, classes and resolution are read off the weights. Before anything is
written, the equations of DiT (arXiv 2212.09748) are evaluated here on the weights of the file, in float64, and the
converted model must predict the same; for XL/2 that takes about 12 GB of main memory.

diffusers' own `DiTTransformer2DModel` has other time features than DiT was trained with (frequencies
`10000^(-i/127)` instead of `10000^(-i/128)`), and so predicts otherwise. Hence the folder's transformer is an
`OriginalDiTTransformer2DModel` of this package: the same class with the right frequencies. `--time_features diffusers`
writes the plain class all the same, for programs that know no other and for `swap_adaln_for_rotation`; the weights are
then compared with diffusers' features on both sides, and the distance to the original is printed.

There is no conversion into `MPDiTTransformer2DModel`, not even in configuration A: it has no biases and no GELU, which
every DiT has. To go on from a DiT with this package, see `swap_adaln_for_rotation` (finetune_rotation.py).
"""

import argparse
import math
import pickle
from pathlib import Path

from diffusers_mp.arguments import at_least, check_paths
from diffusers_mp.scripts import ScriptParser, command_line, run_script


def make_parser() -> ScriptParser:
    parser = ScriptParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", type=Path, required=True, help="file of the original release, .pt")
    add("--output_dir", type=Path, required=True, help="new folder of the DiTPipeline")
    add(
        "--vae",
        default="stabilityai/sd-vae-ft-mse",
        help="folder or Hub id of the VAE, or of a pipeline that has one; stored too",
    )
    add("--id2label", help="JSON file of id and name [for 1000 classes, ImageNet's from the Hub]")
    add("--num_heads", type=at_least(1), help="attention heads [those of the published width]")
    add(
        "--time_features",
        choices=("original", "diffusers"),
        default="original",
        help="those of training, or those of diffusers' plain class, which predicts otherwise",
    )
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        parser.error(f"--output_dir must be a new folder, got {args.output_dir}, which exists")
    return args


if __name__ == "__main__":
    args = command_line(parse_args, make_parser())  # before the imports below, which take seconds

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from huggingface_hub import hf_hub_download

from diffusers_mp import OriginalDiTTransformer2DModel
from diffusers_mp.autoencoders import scaling_for_dit_pipeline
from diffusers_mp.data.encoding import load_vae
from diffusers_mp.files import read_json
from diffusers_mp.publishing.hub import mask_places
from diffusers_mp.sources import check_reachable, naming


# Attention heads of the published widths; nothing in a checkpoint tells them.
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# Both sides compute in float64, except for time features and position tables, which both make in float32.
TOLERANCE = 1e-6
NAMES_REPOSITORY = "facebook/DiT-XL-2-256"

# A layer's name in the file → its name in the class; of a block, behind the block's own.
OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# Shared by the blocks in the file, of each block in the class.
TIME = {"t_embedder.mlp.0": "linear_1", "t_embedder.mlp.2": "linear_2"}
LABELS = "y_embedder.embedding_table.weight"


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint without running what it may contain.

    Args:
        path (str or Path): a file of tensors by name, or of what the original trainer saves, with averages in "ema".
    Returns:
        dict: name → tensor, on the CPU.
    Raises:
        ValueError: if the file cannot be read as plain tensors.
    """
    try:
        # The trainer stores its arguments beside the weights, a record without behaviour.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"`checkpoint_path` must be a whole file of plain tensors, got {path}: {error}") from error
    weights = checkpoint.get("ema", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"`checkpoint_path` must hold tensors by name, by themselves or under 'ema', got {path} with "
            f"{sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__}."
        )
    return weights


def read_config(weights: dict[str, torch.Tensor], num_heads: int | None) -> dict:
    """The arguments of the transformer that a checkpoint belongs to.

    Args:
        weights (dict): name → tensor, as in the file.
        num_heads (int, optional): number of attention heads, for widths that were not published.
    Returns:
        dict: for `DiTTransformer2DModel`.
    Raises:
        ValueError: if names, shapes or values are not those of a DiT.
    """
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    layers = [*OUTER, *TIME, *(f"blocks.{n}.{name}" for n in range(depth) for name in (*BLOCK, "attn.qkv"))]
    expected = {LABELS, "pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}
    if missing := sorted(expected - weights.keys()):
        raise ValueError(f"the checkpoint must have every weight of a DiT, it lacks {len(missing)}: {missing[:4]}.")
    if unknown := sorted(weights.keys() - expected):
        raise ValueError(
            f"the checkpoint must have no other weights than a DiT, it has {len(unknown)}: {unknown[:4]}."
        )
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"the checkpoint's weights must be finite, {len(broken)} are not: {broken[:4]}.")

    patch, num_tokens = weights["x_embedder.proj.weight"], weights["pos_embed"].shape[-2]
    side = math.isqrt(num_tokens)
    if patch.ndim != 4 or side**2 != num_tokens:
        raise ValueError(
            f"the checkpoint must be of square images, it has patches of shape {tuple(patch.shape)} and "
            f"{num_tokens} positions."
        )
    dim, in_channels, patch_size, _ = patch.shape
    num_heads = num_heads or NUM_HEADS.get(dim)
    if num_heads is None or dim % num_heads:
        raise ValueError(
            f"`num_heads` must be given for the width {dim}, which was not published, and divide it; got {num_heads}."
        )
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": dim // num_heads,
        "in_channels": in_channels,
        "out_channels": weights["final_layer.linear.bias"].shape[0] // patch_size**2,
        "num_layers": depth,
        "sample_size": side * patch_size,
        "patch_size": patch_size,
        "num_embeds_ada_norm": weights[LABELS].shape[0] - 1,  # the last row is the null class
        "norm_eps": 1e-6,
    }


def convert_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under the names of `DiTTransformer2DModel`.

    Args:
        weights (dict): name → tensor, as in the file.
    Returns:
        dict: name → tensor. The position table is left out, since the class makes it itself.
    """
    converted = {}
    for kind in ("weight", "bias"):
        for theirs, ours in OUTER.items():
            converted[f"{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
    num_blocks = sum(name.endswith("attn.qkv.weight") for name in weights)
    for number in range(num_blocks):
        source, block = f"blocks.{number}", f"transformer_blocks.{number}"
        converted[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = weights[LABELS]
        for kind in ("weight", "bias"):
            for theirs, ours in TIME.items():
                converted[f"{block}.norm1.emb.timestep_embedder.{ours}.{kind}"] = weights[f"{theirs}.{kind}"]
            for theirs, ours in BLOCK.items():
                converted[f"{block}.{ours}.{kind}"] = weights[f"{source}.{theirs}.{kind}"]
            for name, value in zip("qkv", weights[f"{source}.attn.qkv.{kind}"].chunk(3), strict=True):
                converted[f"{block}.attn1.to_{name}.{kind}"] = value
    return converted


@torch.no_grad()
def original_prediction(
    weights: dict[str, torch.Tensor],
    latents: torch.Tensor,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
    num_heads: int,
    last_frequency: float = 128.0,
) -> torch.Tensor:
    """The equations of DiT with adaLN-Zero (arXiv 2212.09748, section 3) on the weights of a file.

    Args:
        weights (dict): name → tensor, as in the file.
        latents (torch.Tensor): shape (B, C, H, W), in whose dtype it computes.
        timestep (torch.Tensor): shape (B,).
        class_labels (torch.Tensor): shape (B,), the number of classes being the null class.
        num_heads (int): number of attention heads.
        last_frequency (float): i at which a frequency `10000^(-i/last_frequency)` would be 1/10000.
    Returns:
        torch.Tensor: shape (B, C_out, H, W).
    """

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"].to(x), weights[f"{name}.bias"].to(x))

    def modulate(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    # Features in float32, as they were in training.
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / last_frequency)
    angles = timestep[:, None].float() * frequencies
    features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(latents)
    time = linear(F.silu(linear(features, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    conditioning = F.silu(time + weights[LABELS][class_labels].to(latents))

    patch = weights["x_embedder.proj.weight"]
    x = F.conv2d(latents, patch.to(latents), weights["x_embedder.proj.bias"].to(latents), stride=patch.shape[-1])
    height, width = x.shape[-2:]
    x = x.flatten(2).mT + weights["pos_embed"].to(latents)
    for number in range(sum(name.endswith("attn.qkv.weight") for name in weights)):
        block = f"blocks.{number}"
        modulations = linear(conditioning, f"{block}.adaLN_modulation.1").chunk(6, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations
        heads = linear(modulate(x, shift1, scale1), f"{block}.attn.qkv").unflatten(-1, (3, num_heads, -1))
        attended = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        x = x + gate1[:, None] * linear(attended, f"{block}.attn.proj")
        hidden = F.gelu(linear(modulate(x, shift2, scale2), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + gate2[:, None] * linear(hidden, f"{block}.mlp.fc2")
    shift, scale = linear(conditioning, "final_layer.adaLN_modulation.1").chunk(2, dim=1)
    x = linear(modulate(x, shift, scale), "final_layer.linear")
    patches = x.unflatten(-1, (patch.shape[-1], patch.shape[-1], -1)).unflatten(1, (height, width))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


@torch.no_grad()
def largest_difference(
    transformer: DiTTransformer2DModel, weights: dict[str, torch.Tensor], last_frequency: float = 128.0, seed: int = 0
) -> float:
    """How far the predictions of a converted transformer are from those of the original equations, in float64.

    Args:
        transformer (DiTTransformer2DModel): the converted one; it is in float32 again afterwards.
        weights (dict): name → tensor, as in the file.
        last_frequency (float): as in `original_prediction`.
        seed (int): seed of the latents and labels.
    Returns:
        float: largest difference, relative to the largest prediction, over timesteps from 0 to 999 and labels of which
        one is the null class.
    """
    config, generator = transformer.config, torch.Generator().manual_seed(seed)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    num_classes = config.num_embeds_ada_norm
    transformer.double()
    expected, predicted = [], []
    for number, timestep in enumerate((0, 1, 37, 250, 613, 999)):
        latents = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
        label = num_classes if number == 3 else int(torch.randint(num_classes, (), generator=generator))
        inputs = latents, torch.tensor([timestep]), torch.tensor([label])
        expected.append(original_prediction(weights, *inputs, config.num_attention_heads, last_frequency))
        predicted.append(transformer(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample)
    transformer.float()
    expected, predicted = torch.cat(expected), torch.cat(predicted)
    # A DiT that was never trained predicts zeros.
    size = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((predicted - expected).abs().max() / size).item()


def read_names(path: str | None, num_classes: int) -> dict[int, str] | None:
    """Names of the classes: of a file, or for 1000 classes those of ImageNet as the Hub has them beside DiT.

    Args:
        path (str, optional): JSON file of id → name.
        num_classes (int): number of classes.
    Returns:
        dict or None: id → name; None without a file for another number of classes.
    Raises:
        ValueError: if the names are not those of the ids 0 to num_classes - 1, or the Hub cannot be reached.
    """
    if path is None and num_classes != 1000:
        return None
    if path is None:
        try:
            check_reachable("id2label", NAMES_REPOSITORY, ["model_index.json"], instead="a JSON file of id and name")
            index = hf_hub_download(NAMES_REPOSITORY, "model_index.json")
        except OSError as error:
            raise ValueError(
                f"`id2label` must be given where the names of ImageNet cannot be fetched from {NAMES_REPOSITORY} on "
                f"the Hub: a JSON file of id and name. {type(error).__name__}: {error}"
            ) from error
        names = read_json(index, keys=["id2label"])["id2label"]
    else:
        names = read_json(path, way_out='`id2label` takes a JSON file such as {"0": "cat", "1": "dog"}')
    if wrong := [id for id, name in names.items() if not id.isdecimal() or not isinstance(name, str)]:
        raise ValueError(f"`id2label` must map ids to names, {path} has {wrong[0]!r}: {names[wrong[0]]!r}.")
    names = {int(id): name for id, name in names.items()}
    if sorted(names) != list(range(num_classes)):
        raise ValueError(f"`id2label` must name the ids 0 to {num_classes - 1}, got {len(names)} ids.")
    return names


def main(args: argparse.Namespace) -> None:
    check_paths(args)
    with naming("checkpoint_path", args.checkpoint_path):
        weights = load_weights(args.checkpoint_path)
        config = read_config(weights, args.num_heads)
    num_classes = config["num_embeds_ada_norm"]
    names = read_names(args.id2label, num_classes)
    vae = load_vae(args.vae)
    if vae is None:
        raise ValueError("`vae` must be an autoencoder, which a DiTPipeline cannot do without, got 'none'.")
    scaling_for_dit_pipeline(vae, config["in_channels"])
    is_exact = args.time_features == "original"
    transformer = (OriginalDiTTransformer2DModel if is_exact else DiTTransformer2DModel)(**config).eval()
    try:
        transformer.load_state_dict(convert_weights(weights))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's shapes must be those of a DiT of {config}: {error}") from error

    difference = largest_difference(transformer, weights, 128.0 if is_exact else 127.0)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the converted transformer must predict what the original does within {TOLERANCE:g} of the largest "
            f"prediction, it differs by {difference:.3g}; nothing was written. Another position table or an altered "
            "architecture would explain it."
        )
    print(f"Converted: {config}")
    print(f"Largest difference between predictions, relative to the largest prediction: {difference:.1e}")
    if not is_exact:
        print(
            f"That is with diffusers' time features on both sides. To the original: "
            f"{largest_difference(transformer, weights):.1e}"
        )
    if names is None:
        print(f"No names for the {num_classes} classes: give --id2label to have them stored.")

    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipeline = DiTPipeline(transformer, vae, scheduler)
    if names is not None:
        # Of itself it would not store them.
        pipeline.register_to_config(id2label={str(id): name for id, name in names.items()})
    mask_places(pipeline)
    pipeline.save_pretrained(args.output_dir)
    first_line = "import diffusers_mp; " if is_exact else ""
    print(f"Saved: {first_line}DiTPipeline.from_pretrained({str(args.output_dir)!r})")


if __name__ == "__main__":
    run_script(main, args, make_parser())
