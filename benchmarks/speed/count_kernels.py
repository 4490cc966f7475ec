"""How many kernels does a training step start, and how many bytes do they move? Counted on a device that is not there.

    python benchmarks/speed/count_kernels.py
    python benchmarks/speed/count_kernels.py --models A E --operators

Tensors are fake, on a device that stands in for an accelerator, so that the routes of accelerators are taken; a step
is forward in bfloat16 autocast, backward, fused Adam, forced normalisation and averages of two widths. What starts no
kernel, such as a view, is left out. What the stand-in takes apart, and an accelerator does not, counts as one:
attention (forward and backward), the derivative of SiLU, RMS norms. An operator on lists of tensors counts as one on
PyTorch's fast route, which wants equal dtypes, shapes and strides, and as one for each tensor elsewhere.
`PYTHONPATH=CHECKOUT` counts another commit of the package. Prints Markdown; asserts nothing.
"""

import argparse
import collections
import functools

import torch
import torch.nn.functional as F
from compared import E_SHIFT, F_BOUND, STOCK, A, E, config_of
from diffusers import DiTTransformer2DModel
from facts import facts_of_run, head, table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from diffusers_mp import (
    MPDiTTransformer2DModel,
    PowerFunctionEMA,
    fused,
    normalize_weights_,
    parameter_groups,
    trust_rows_,
)


MODELS = {A: "A", E: "E", E_SHIFT: "E with shift", F_BOUND: "F", STOCK: "diffusers' DiT"}
STARTS_NOTHING = {"device", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "detach"}
LIBRARIES = []  # as long as the process lives
# What autocast runs in bfloat16, and in float32, out of CUDA's lists: all that a step calls.
IN_BFLOAT16 = ("mm", "bmm", "addmm", "matmul", "linear")
IN_FLOAT32 = (
    "layer_norm",
    "reciprocal",
    "exp",
    "pow.Tensor_Scalar",
    "sum.dim_IntList",
    "linalg_vector_norm",
    "mse_loss",
)


class Backend:
    """What PyTorch asks the module of a device for."""

    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)


class Counted(TorchDispatchMode):
    """Kernels by the name of their operator, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels, self.num_bytes = collections.Counter(), 0
        self.wide, self.widths = collections.Counter(), ()

    def start(self, *widths):
        """Begin anew; results in float32 of so many entries, those of all tokens, are counted as well."""
        self.kernels.clear()
        self.wide.clear()
        self.num_bytes, self.widths = 0, widths

    def add(self, name, tensors, kernels=1):
        self.kernels[name] += kernels
        self.num_bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        aliases = [returned.alias_info for returned in function._schema.returns]
        is_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not (is_view or name in STARTS_NOTHING or name.startswith("_record_function")):
            leaves = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.add(name, leaves, kernels_of_lists(args) if name.startswith("_foreach") else 1)
            results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.wide[name] += any(
                each.dtype == torch.float32 and each.shape.numel() in self.widths for each in results
            )
        return result


def kernels_of_lists(args) -> int:
    """Of an operator on lists of tensors: one on the fast route."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and isinstance(arg[0], torch.Tensor)]
    kinds = [[(each.shape, each.stride(), each.dtype, each.device) for each in tensors] for tensors in lists]
    is_dense = all(torch._prims_common.is_non_overlapping_and_dense_or_false(t) for tensors in lists for t in tensors)
    is_fast = is_dense and all(kind == kinds[0] for kind in kinds) and len({t.dtype for t in lists[0]}) == 1
    return 1 if is_fast else len(lists[0])


class Whole(torch.autograd.Function):
    """What an accelerator has in a kernel each way, of which the first input tells the shape of the result."""

    @staticmethod
    def forward(ctx, counted, name, *inputs):
        ctx.counted, ctx.name = counted, name
        ctx.save_for_backward(*inputs)
        result = torch.empty_like(inputs[0])
        counted.add(name, [*inputs, result])
        return result

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        grads = [torch.empty_like(each) for each in inputs]
        ctx.counted.add(f"{ctx.name}_backward", [grad, *inputs, *grads])
        return None, None, *grads


def stand_in(counted: Counted) -> None:
    """Put `Whole` where the stand-in device takes operators apart."""
    _setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    rest, library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    LIBRARIES.extend((rest, library))
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype in ((IN_BFLOAT16, torch.bfloat16), (IN_FLOAT32, torch.float32)):
        for name in names:
            library.impl(
                name,
                functools.partial(autocast, getattr(torch.ops.aten, name.partition(".")[0]), dtype),
                "AutocastPrivateUse1",
            )
    library.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")

    def attention(query, key, value, **_):
        return Whole.apply(counted, "attention", *cast((query, key, value), torch.bfloat16))

    F.scaled_dot_product_attention = attention
    F.rms_norm = lambda x, *_, **__: Whole.apply(counted, "rms_norm", x)
    # Fake tensors are a subclass, of which there are none on a device. Older commits of the package have no kernels.
    if hasattr(fused, "KERNELS_OF_NORMS"):
        fused.KERNELS_OF_NORMS.add("gpu")
        fused._has_kernel = lambda grad, rows: grad.dtype == torch.float32 and not torch.is_grad_enabled()


def cast(nest, dtype: torch.dtype):
    """Tensors of floating point in another dtype."""
    return tree_map_only(torch.Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, nest)


def autocast(function, wanted: torch.dtype, /, *args, **kwargs):
    """A function in a dtype, without autocast within it; sums and norms that say their dtype are left alone."""
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return function(*(args if kwargs.get("dtype") else cast(args, wanted)), **kwargs)


def make_model(name: str, config: dict) -> torch.nn.Module:
    """A model in training."""
    if name == STOCK:
        return DiTTransformer2DModel(**config).train()
    return trust_rows_(MPDiTTransformer2DModel(**config).train())


def count(name: str, size: str, batch_size: int, counted: Counted, **overrides: int) -> None:
    """Count the second training step of a model, of latents of 4x16x16 and 1000 classes, which learns a variance."""
    model = make_model(name, config_of(name, size, 16, **overrides))
    optimizer = torch.optim.Adam(parameter_groups(model), betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(model, (0.05, 0.10))
    noisy, noise = torch.randn(2, batch_size, 4, 16, 16)
    timestep, class_labels = torch.randint(0, 1000, (2, batch_size))

    def step():
        with torch.autocast("gpu", dtype=torch.bfloat16):
            prediction = model(noisy, timestep=timestep, class_labels=class_labels).sample
        (prediction[:, :4].float() - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        normalize_weights_(model)
        ema.update(ema.step + 1)

    step()
    width = batch_size * 64 * model.config.num_attention_heads * model.config.attention_head_dim
    counted.start(width, 4 * width)
    with counted:
        step()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S/2", "XL/2"], help="as in `get_preset`")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--models", nargs="+", default=[*MODELS.values()], choices=MODELS.values())
    parser.add_argument("--operators", action="store_true", help="print which operators they are")
    args = parser.parse_args()
    counted, mode, rows = Counted(), FakeTensorMode(), []
    stand_in(counted)
    print(f"{head(facts_of_run())}\n")
    for size in args.sizes:
        of_first = None
        for name in [name for name, label in MODELS.items() if label in args.models]:
            with mode, torch.device("gpu"):
                count(name, size, args.batch_size, counted)
            numbers = counted.kernels.total(), counted.num_bytes
            of_first = of_first or numbers
            ratios = [f"{number / base:.2f}" for number, base in zip(numbers, of_first, strict=True)]
            rows.append([size, MODELS[name], numbers[0], ratios[0], f"{numbers[1] / 1e9:.1f}", ratios[1]])
            rows[-1].append(counted.wide.total())
            if args.operators:
                print(f"{size}, {MODELS[name]}\n\n{table(['operator', 'kernels'], counted.kernels.most_common())}\n")
                print(f"in float32 and as wide as tokens: {dict(+counted.wide)}\n")
    print(table(["size", "model", "kernels", "ratio", "GB", "ratio", "float32 as wide as tokens"], rows))


if __name__ == "__main__":
    main()
