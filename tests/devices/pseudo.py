"""A device without hardware: tensors over CPU memory that refuse to meet CPU tensors, as CUDA's do.

Importing this takes PrivateUse1 for the whole process, so tests run it in a separate process. The interface is
experimental in torch: see its test_privateuseone_python_backend.py. It shows mixed devices, float64 where there is
none, and operations for which the host waits; it cannot show kernels, speed or memory.
"""

from collections import Counter

import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pseudo"
GENERATOR = torch.Generator()
"""The device's own random numbers."""
WAITS: Counter[str] = Counter()
"""Operations for which CUDA's host waits, by name."""
WAITING = """_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal is_nonzero bincount
repeat_interleave _linalg_eigh _linalg_svd linalg_cholesky allclose""".split()
HAS_FLOAT64 = [True]
MAY_MIX = ("copy_", "_copy_from")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
NO_SCALARS = ("cat", "stack", "isin", "equal", "searchsorted", "index_add_", "index_copy_", "gather", "embedding")
"""Operators that do not even take a CPU tensor without dimensions."""
FACTORIES = """empty.memory_format empty_strided arange arange.start arange.start_step eye eye.m linspace tril_indices
triu_indices randperm randperm.generator scalar_tensor rand rand.generator randn randn.generator randint
randint.generator randint.low randint.low_generator full zeros ones""".split()
# torch/aten/src/ATen/autocast_mode.h: what CUDA computes in half precision, in float32, and in the widest type.
LOWER = """_convolution conv1d conv2d conv3d convolution addmm addmv matmul mm mv linear addbmm baddbmm bmm
scaled_dot_product_attention linalg_vecdot einsum""".split()
FLOAT = """exp log log1p pow.Tensor_Scalar pow.Tensor_Tensor reciprocal rsqrt softplus layer_norm native_layer_norm
group_norm cosine_similarity nll_loss kl_div mse_loss binary_cross_entropy_with_logits cdist norm.Scalar""".split()
SUMS = "prod softmax.int log_softmax.int cumprod cumsum linalg_vector_norm sum sum.dim_IntList".split()
WIDEST = "addcdiv addcmul bilinear cross dot index_put tensordot scatter_add cat stack".split()


class Backend:
    """torch.pseudo."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: GENERATOR.manual_seed(seed ^ 1))
    get_rng_state = staticmethod(lambda device=NAME: GENERATOR.get_state())
    set_rng_state = staticmethod(lambda state, device=NAME: GENERATOR.set_state(state))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16, torch.float32])


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE, CPU = torch.device(NAME, 0), torch.device("cpu")


class PseudoTensor(Tensor):
    """Wraps the CPU tensor ``inner``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype is torch.float64 and not HAS_FLOAT64[0]:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        wrapper = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **place)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = PseudoTensor(self.inner.detach().clone(memory_format=torch.preserve_format))
            is_parameter = getattr(self, "_is_param", False)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"pseudo({self.inner!r})"


def inner(value):
    return value.inner if isinstance(value, PseudoTensor) else value


def run(func, args, kwargs):
    """Run an operator on the CPU memory behind its tensors, if CUDA would run it."""
    schema, name = func._schema, func._schema.name.split("::")[1]
    names, kwargs = [argument.name for argument in schema.arguments], dict(kwargs)
    if name == "_to_copy":
        device = kwargs.pop("device", None)
        if device is not None and torch.device(device).type == "cpu":
            WAITS["to the host"] += 1
        out = func(inner(args[0]), **{n: v for n, v in kwargs.items() if n not in ("non_blocking", "pin_memory")})
        return out if device is not None and torch.device(device).type == "cpu" else PseudoTensor(out)
    if name in ("is_pinned", "_fused_sdp_choice"):
        return 0
    check(name, args, kwargs)
    if name in WAITING or (name in INDEXING and any(is_mask(index) for index in tree_leaves(args[1]))):
        WAITS[name] += 1
    if name == "copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
        WAITS[f"{args[1].device.type} to {args[0].device.type}"] += args[1].device != args[0].device
    to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if "device" in names:
        kwargs |= {"device": CPU}
        kwargs.pop("pin_memory", None)
    if "generator" in names:
        kwargs["generator"] = GENERATOR
        args = args[: names.index("generator")]
    written = [
        tensor.inner
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
        if isinstance(tensor, PseudoTensor)
    ]
    wrappers = {id(t.inner): t for t in tree_leaves((args, kwargs)) if isinstance(t, PseudoTensor)}
    shapes = [value.shape for value in written]
    out = func(*tree_map(inner, tuple(args)), **tree_map(inner, kwargs))
    assert shapes == [value.shape for value in written], f"{func} resizes what it writes"
    is_written = {id(value) for value in written}

    def wrapped(value):
        if not isinstance(value, Tensor) or to_host:
            return value
        return wrappers[id(value)] if id(value) in is_written else PseudoTensor(value)

    return type(out)(map(wrapped, out)) if isinstance(out, list | tuple) else wrapped(out)


def is_mask(index):
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def check(name, args, kwargs):
    """Raise what CUDA raises where devices are mixed."""
    if name in MAY_MIX:
        return
    first = args[0] if args else None
    if name in INDEXING:
        if not isinstance(first, PseudoTensor):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        args = (first, *args[2:])  # indices may be on the CPU
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and not isinstance(tensor, PseudoTensor):
            if tensor.dim() or name in NO_SCALARS or name.startswith("_foreach"):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu! ({name})"
                )


def overload(text):
    name, _, kind = text.partition(".")
    return getattr(getattr(torch.ops.aten, name), kind or "default")


def factory(op):
    def kernel(*args, **kwargs):
        kwargs |= {"device": CPU}
        kwargs.pop("pin_memory", None)
        if "generator" in [argument.name for argument in op._schema.arguments]:
            kwargs["generator"] = GENERATOR
        return PseudoTensor(op(*args, **kwargs))

    return kernel


def copy_from(source, target, non_blocking=False):
    if source.device != target.device and not non_blocking:
        WAITS[f"{source.device.type} to {target.device.type}"] += 1
    inner(target).copy_(inner(source))
    return target


AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def casting(op, rule):
    """An operator whose tensors become what autocast on CUDA makes of them."""

    def is_cast(value):
        return isinstance(value, PseudoTensor) and value.is_floating_point() and value.dtype is not torch.float64

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            dtypes = [value.dtype for value in tree_leaves((args, kwargs)) if is_cast(value)]
            dtype = torch.get_autocast_dtype(NAME) if rule == "lower" else torch.float32
            if rule == "widest" and torch.float32 not in dtypes and dtypes:
                dtype = dtypes[0]
            args, kwargs = tree_map(lambda value: value.to(dtype) if is_cast(value) else value, (args, kwargs))
            return op(*args, **kwargs)

    return kernel


aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
every.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
aten.impl("_copy_from", copy_from, "PrivateUse1")
for text in FACTORIES:
    aten.impl(text, factory(overload(text)), "PrivateUse1")
for texts, rule in ((LOWER, "lower"), (FLOAT, "float"), (SUMS, "float"), (WIDEST, "widest")):
    for text in texts:
        aten.impl(text, casting(overload(text), rule), "AutocastPrivateUse1")

torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps its parameters, as with CUDA
# oneDNN's bf16 weight gradient of a strided 3 x 3 convolution over a 1 x 1 map has entries that nobody wrote.
torch.backends.mkldnn.set_flags(False)


class PseudoAccelerator(Accelerator):
    """For Fabric."""

    setup_device = teardown = lambda self, *args: None
    parse_devices = staticmethod(lambda devices: [0])
    get_parallel_devices = staticmethod(lambda devices: [DEVICE])
    auto_device_count = staticmethod(lambda: 1)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: NAME)


def connect(accelerator="pseudo", devices=1, precision="32-true", deterministic=False):
    """For tests, instead of ``fedlscl.federated.engine.connect``."""
    scaler = torch.amp.GradScaler(NAME) if precision == "16-mixed" else None
    plugin = Precision() if precision == "32-true" else MixedPrecision(precision, NAME, scaler)
    fabric = Fabric(strategy=SingleDeviceStrategy(DEVICE, PseudoAccelerator(), precision=plugin), devices=1)
    fabric.launch()
    return fabric
