"""A second device, "gpu", with the rules of a real one and the CPU's memory: PyTorch's PrivateUse1, with one kernel.

Its tensors are PyTorch's own and have values, so that what is computed there can be compared with the CPU. What a GPU
refuses is refused: tensors of two devices in one operator, numbers drawn on the device by a generator of the CPU. What
makes the host wait for a GPU is noted with its place in the code: values that are read, and copies that block.

What it cannot show: that a copy which does not block is read before it is there; speed; a device's own rounding.

`set_up` cannot be undone: call it in a separate process.
"""

import collections
import contextlib
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import backend_registration


ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cpu")  # until `set_up`
CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
SET = torch.ops.aten.set_.source_Storage_storage_offset
# Operators whose result, or its shape, the host has to know; and those that look whether they have converged.
READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}
READS |= {"repeat_interleave", "_linalg_eigh", "_linalg_svd"}
# Beside what is computed entry by entry: operators that take a single number from the CPU, and those with indices.
NUMBERS = {"fill_", "masked_fill", "masked_fill_"}
INDEXING = {"index", "index_put", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# What autocast computes in half precision, on a GPU and on the CPU.
HALF_PRECISION = "linear matmul mm bmm addmm baddbmm conv2d scaled_dot_product_attention".split()

# What was noted since the last `mark`: "read" or "copy" and the place → how often; and what between one and the next.
noted, marks = collections.Counter(), []
# Storages of the device, by address → the storage of the CPU that has their memory, and whether they are still there.
_memory = {}
_libraries = []


class Stream(contextlib.nullcontext):
    """The one queue of the device, in which all is done at once."""

    def synchronize(self):
        pass


class Event(Stream):
    """An event on the device, over when it is recorded."""

    def __init__(self, device=None):
        super().__init__()

    def record(self):
        pass


STREAM = Stream()


class Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks about the device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device=None):
        return STREAM

    def stream(self, stream):
        return stream

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


def set_up():
    """Make the device; once, in a process that does nothing else."""
    global DEVICE
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
    DEVICE = torch.device("gpu", 0)
    # Parameters stay the objects that they are, as on a GPU, when a module moves; whatever else refers to them.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.utils.swap_tensors = torch._C._swap_tensor_impl
    torch.Event = Event
    kernels, operators = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    kernels.fallback(_run, "PrivateUse1")
    kernels.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in HALF_PRECISION:
        operators.impl(name, _in_half_precision(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    # Memory is never pinned.
    operators.impl("_to_copy", _copy_of, "PrivateUse1")
    operators.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")
    operators.impl("is_pinned", lambda tensor, device=None: False, "CPU")
    aten = torch.ops.aten
    for name, run in {
        # Without its own kernel a device is refused these, and would put the third together of others.
        "convolution_overrideable": lambda *args: _run(aten.convolution.default, *args),
        "convolution_backward_overrideable": lambda grad, input, weight, *args: _run(
            aten.convolution_backward.default, grad, input, weight, [len(weight)], *args
        ),
        "native_group_norm": lambda *args: _run(aten.native_group_norm.default, *args),
    }.items():
        operators.impl(name, run, "PrivateUse1")
    _libraries.extend([kernels, operators])


def mark():
    """What was noted since the last mark becomes an entry of `marks`."""
    marks.append(collections.Counter(noted))
    noted.clear()
    for address in [address for address, (storage, _) in _memory.items() if storage.expired()]:
        del _memory[address]


def _run(operator, *args, **kwargs):
    """Any operator on tensors of the device: the CPU's, on the same memory."""
    name, pairs, others = operator.overloadpacket.__name__, [], []

    def on_cpu(value):
        if isinstance(value, torch.Tensor):
            if value.device != DEVICE:
                others.append(value)
                return value
            pairs.append((_memory_of(value), value))
            return pairs[-1][0]
        if isinstance(value, (list, tuple)):
            return [on_cpu(each) for each in value]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def on_device(value):
        if isinstance(value, (list, tuple)):
            return type(value)(on_device(each) for each in value)
        if not isinstance(value, torch.Tensor):
            return value
        storage = None
        for raw, tensor in pairs:
            if raw is value:
                return tensor
            if raw.untyped_storage()._cdata == value.untyped_storage()._cdata:
                storage = tensor.untyped_storage()
        return _place(torch._C._acc.create_empty_tensor((0,), value.dtype), value, storage)

    raw_args, raw_kwargs = on_cpu(args), {key: on_cpu(value) for key, value in kwargs.items()}
    if name == "_copy_from":
        source, target, *non_blocking = args
        if others and not any(non_blocking):
            _note("read" if source.device == DEVICE else "copy")
        raw_args[1].copy_(raw_args[0])
        return target
    if others:
        _check_devices(operator, name, args, kwargs, others)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a 'gpu' device type for generator but found 'cpu': {operator}")
    if name in READS or name in INDEXING and _has_mask(args):
        _note("read")
    results = operator(*raw_args, **raw_kwargs)
    for raw, tensor in pairs:
        # What was written to `out=` or resized may have another shape now, or other memory.
        if raw.shape != tensor.shape or raw.stride() != tensor.stride() or raw.data_ptr() != tensor.data_ptr():
            _place(tensor, raw)
    device = kwargs.get("device")
    return results if device is not None and torch.device(device).type == "cpu" else on_device(results)


def _copy_of(tensor, *, dtype=None, device=None, non_blocking=False, memory_format=None, **_):
    device, memory_format = device or tensor.device, memory_format or torch.preserve_format
    copy = torch.empty_like(tensor, dtype=dtype or tensor.dtype, device=device, memory_format=memory_format)
    return copy.copy_(tensor, non_blocking=non_blocking)


def _memory_of(tensor):
    """A tensor of the CPU on the memory of one of the device."""
    memory = _memory[tensor.untyped_storage()._cdata][1]
    return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _place(tensor, raw, storage=None):
    """Give a tensor of the device the memory, the shape and the strides of one of the CPU; of it, or of `storage`."""
    if storage is None:
        memory = raw.untyped_storage()
        storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), DEVICE, memory.nbytes())
        _memory[storage._cdata] = StorageWeakRef(storage), memory
    return SET.redispatch(CPU_KERNEL, tensor, storage, raw.storage_offset(), raw.shape, raw.stride())


def _check_devices(operator, name, args, kwargs, others):
    """What a GPU takes from the CPU: single numbers into its own results, and indices, which it has to copy."""
    written = [
        value
        for argument, value in zip(operator._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    indices = [each for each in args[1] if each is not None] if name in INDEXING else []
    for other in others:
        is_index = any(other is index for index in indices)
        takes_numbers = torch.Tag.pointwise in operator.tags or name in NUMBERS or name in INDEXING
        if any(other is value for value in [*written, kwargs.get("out")]) or not (
            is_index or (other.ndim == 0 and takes_numbers)
        ):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {operator} got one of shape {tuple(other.shape)} "
                "on the CPU."
            )
        if is_index:
            _note("copy")


def _has_mask(args):
    # A mask whose place gets a single number needs no list of its entries.
    has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return has_mask and not (len(args) > 2 and args[2].numel() == 1)


def _in_half_precision(operator):
    """What autocast does with an operator; the keyword arguments of those here are no tensors."""
    outside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args, **kwargs):
        dtype = torch.get_autocast_dtype("gpu")

        def cast(value):
            is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if is_tensor else value

        with torch._C._ExcludeDispatchKeyGuard(outside):
            return operator(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return run


def _note(what):
    """Count a wait of the host under the function of this repository, and that of a library which it had called."""
    frame, library = sys._getframe(2), None
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if function.startswith("<"):
            pass  # comprehensions, which later Pythons do not count as functions
        elif "/site-packages/" in path:
            inner = path.partition("/site-packages/")[2]
            if library is None and not inner.startswith(("torch/_", "torch/utils/_")):
                library = f"{inner}:{function}"
        elif path.startswith(f"{ROOT}/") and path != __file__:
            place = f"{path.removeprefix(f'{ROOT}/')}:{function}"
            noted[f"{what} {place}" if library is None else f"{what} {place} > {library}"] += 1
            return
        frame = frame.f_back
    noted[f"{what} {library or 'a thread of autograd'}"] += 1
