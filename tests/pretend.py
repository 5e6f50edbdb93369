"""A CUDA device that is pretended: its tensors report cuda:0 and are computed on the CPU.

    with pretended_cuda() as log:
        x = torch.zeros(3, device="cuda")
        float(x.sum())
    log.waits  # one entry: the operation, and the line of the package that called it

An operation of pretended tensors and CPU tensors raises `RuntimeError`, as with CUDA (0-dim CPU
tensors are allowed). Every operation for which the host would wait for the device is logged, and so
is the number of operations, each of which launches at least one kernel. CPU tensors are pinned by
`pin_memory` only.
"""

import collections
import contextlib
import traceback
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import densecl
from densecl.runtime import distributed

PACKAGE = str(Path(densecl.__file__).parent)
CUDA = torch.device("cuda", 0)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# the host needs their result, or the size of their result
READS = {
    *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"),
    *("unique_consecutive", "_unique2", "unique_dim", "_linalg_check_errors", "histc"),
}


def calling_line():
    """The innermost line of the package on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE):
            return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "outside of the package"


class Log:
    """What happened on the device since the last `clear`."""

    def __init__(self):
        self.clear()

    def clear(self):
        self.waits = []  # "operation at line"
        self.operations = collections.Counter()

    def wait(self, what):
        self.waits.append(f"{what} at {calling_line()}")


LOG = Log()
PINNED = weakref.WeakSet()  # storages


class CudaTensor(torch.Tensor):
    """A tensor that reports cuda:0; `on_host` has its values.

    PyTorch's C++ code takes it for a CPU tensor.
    """

    @staticmethod
    def __new__(cls, on_host):
        new = torch.Tensor._make_wrapper_subclass(
            cls,
            on_host.size(),
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device="cpu",  # backward of CUDA tensors would need a driver
        )
        new.on_host = on_host
        return new

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __repr__(self):
        return f"CudaTensor({self.on_host})"

    def __reduce_ex__(self, protocol):  # a file of it is read with map_location="cpu"
        return self.on_host.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def on_cuda(x):
    return isinstance(x, CudaTensor)


def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def unwrap(x):
    return x.on_host if on_cuda(x) else x


def copy_waits(source, blocking):
    """Why the host waits for a copy between host and device; empty if it does not."""
    if on_cuda(source):
        return "copy to the host"
    if blocking:
        return "blocking copy to the device"
    return "" if source.untyped_storage() in PINNED else "copy from memory that is not pinned"


def run(function, args, kwargs):
    """Run an ATen operation on the CPU."""
    name = function._overloadpacket._qualified_op_name.split("::")[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = kwargs.get("device")
    if name == "copy_" and on_cuda(args[0]) != on_cuda(args[1]):
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        why = copy_waits(args[1], not non_blocking)
        if why:
            LOG.wait(why)
        function(unwrap(args[0]), unwrap(args[1]))
        return args[0]
    ours = any(map(on_cuda, tensors))
    if ours:
        check_devices(name, tensors, args)
    if ours or is_cuda(device):
        LOG.operations[name] += not function.is_view
    if device is not None:
        kwargs = dict(kwargs, device="cpu")
    out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if not ours and not is_cuda(device):
        return out
    known = {id(x.on_host): x for x in tensors if on_cuda(x)}  # of operations in place

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else CudaTensor(x)

    return tree_map(wrap, out)


def check_devices(name, tensors, args):
    """Raise for a mix of devices; log a wait."""
    if name in INDEXING:
        if not on_cuda(args[0]):
            raise RuntimeError(f"{name} of a CPU tensor by CUDA indices at {calling_line()}")
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                LOG.wait(f"{name} by a mask")
            elif index is not None and not on_cuda(index):
                LOG.wait(f"{name} by a CPU index")
        in_backward = torch._C._current_graph_task_id() >= 0
        # the gradient of index_put contains zeros that C++ makes, on the device that it sees
        tensors = [args[0]] if in_backward else [args[0], *args[2:3]]
    others = [x for x in tensors if isinstance(x, torch.Tensor) and not on_cuda(x) and x.dim()]
    if others:
        shapes = [tuple(x.shape) for x in others]
        raise RuntimeError(f"{name} of CUDA and CPU tensors {shapes} at {calling_line()}")
    if name in READS:
        LOG.wait(name)


class DispatchMode(TorchDispatchMode):
    """Operations without a tensor, such as `zeros(3, device="cuda")`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def target_device(args, kwargs):
    """The device that the arguments of `Tensor.to` name, or None."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, torch.Tensor):
            return x.device
        if isinstance(x, (str, torch.device)):
            return torch.device(x)
    return None


def to(x, *args, **kwargs):
    """`Tensor.to`; a copy between host and device is logged, and no gradient flows through it."""
    device = target_device(args, kwargs)
    # for C++ everything is on the CPU
    args = ["cpu" if isinstance(a, (str, torch.device)) else unwrap(a) for a in args]
    kwargs = {name: unwrap(value) for name, value in kwargs.items() if name != "device"}
    if device is None or is_cuda(device) == on_cuda(x):
        return torch.Tensor.to(x, *args, **kwargs) if args or kwargs else x
    why = copy_waits(x, not (kwargs.get("non_blocking") or any(a is True for a in args)))
    if why:
        LOG.wait(why)
    LOG.operations["_to_copy"] += 1
    source = x.detach()
    if on_cuda(x):
        return torch.Tensor.to(source.on_host, *args, **kwargs)
    out = torch.Tensor.to(source, *args, **kwargs) if args or kwargs else source
    return CudaTensor(out.clone() if out is source else out)


def group_tensors(lists, with_indices=False):
    """`Optimizer._group_tensors_by_device_and_dtype`, by the reported device."""
    groups = REAL_GROUP(lists, with_indices)
    device = CUDA if any(on_cuda(x) for x in lists[0]) else torch.device("cpu")
    return {(device, dtype): group for (_, dtype), group in groups.items()}


REAL_GROUP = torch.optim.Optimizer._group_tensors_by_device_and_dtype


class Autocast(torch.autocast):
    """Autocast of the device is that of the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu", *args, **kwargs)


class FunctionMode(TorchFunctionMode):
    """Functions that dispatch never sees, or that need a real device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_cuda(kwargs.get("device")):
            device = kwargs.pop("device")
            return to(function(*args, **kwargs), device)
        if function is torch.Tensor.to:
            return to(*args, **kwargs)
        if function is torch.Tensor.cuda:
            return to(args[0], CUDA, **kwargs)
        if function is torch.Tensor.cpu:
            return to(args[0], "cpu", **kwargs)
        if function is torch.Tensor.tolist and on_cuda(args[0]):
            LOG.wait("tolist")
            return args[0].on_host.tolist()
        if function is torch.Tensor.numpy and on_cuda(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            PINNED.add(pinned.untyped_storage())
            return pinned
        if function is torch.Tensor.is_pinned:
            return args[0].untyped_storage() in PINNED
        return function(*args, **kwargs)


def replacements():
    """(owner, attribute, value) of what asks for a driver."""
    yield torch.cuda, "is_available", lambda: True
    yield torch.cuda, "device_count", lambda: 1
    yield torch.cuda, "set_device", lambda device: None
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "_lazy_init", lambda: None
    yield torch.cuda, "is_initialized", lambda: True
    yield torch.cuda, "manual_seed_all", lambda seed: None
    yield torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True
    yield torch.cuda, "get_device_capability", lambda *args: (8, 0)
    yield torch.cuda, "synchronize", lambda device=None: LOG.wait("synchronize")
    yield torch.cuda, "max_memory_allocated", lambda *args: 0
    yield torch.cuda, "synchronize", lambda *args: LOG.wait("synchronize")
    yield torch.accelerator, "is_available", lambda: True
    yield torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False
    yield torch, "autocast", Autocast
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        yield torch.optim.Optimizer, name, lambda self: None
    yield torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", group_tensors
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        real = getattr(torch, name)
        yield torch, name, lambda device_type="cpu", real=real: real("cpu")


@contextlib.contextmanager
def pretended_cuda():
    """A context with a pretended device; yields its `Log`."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    LOG.clear()
    distributed._constants.clear()
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in replacements():
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, value))
            stack.enter_context(FunctionMode())
            stack.enter_context(DispatchMode())
            yield LOG
    finally:
        distributed._constants.clear()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
