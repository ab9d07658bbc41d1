"""How rows are stored: floats, int8 or int4 codes with scales, low rank. :func:`encode` and
:func:`decode` run on the device, inside jit.

docs/formats.md has the bytes. A plain group is an array of floats [V, L, W]; an encoded one has
opaque bundles uint8 [V, B]."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float32", "bfloat16", "float16")
CODE_LIMIT = {"int8": 127, "int4": 7}  # symmetric: the most negative code is not used
DTYPES = (*FLOATS, *CODE_LIMIT)

Ranks = tuple[int, ...] | None  # numbers stored in place of a row, by layer; None: the row itself
Basis = tuple[jax.Array, ...]  # by layer of a group: float32 [r, W]; () without ranks


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of one group are stored. Hashable: a static argument of jitted functions."""

    layers: int  # L
    width: int  # W
    dtype: str  # of the stored numbers, one of DTYPES
    scale_group: int = 0  # numbers that share a scale, 0 for a whole record; int8 and int4 only
    ranks: Ranks = None  # by layer

    @property
    def plain(self) -> bool:
        """Stored as an array of floats [V, L, W] that needs no decoding."""
        return self.dtype in FLOATS and self.ranks is None

    @property
    def exact(self) -> bool:
        """Stored as they are, in float32: nothing is lost."""
        return self.plain and self.dtype == "float32"

    @property
    def row_dtype(self) -> str:
        """Float dtype that holds a decoded row without loss."""
        return self.dtype if self.plain else "float32"

    @property
    def numbers(self) -> tuple[int, ...]:
        """n: numbers in each layer's record."""
        return self.ranks or (self.width,) * self.layers

    @property
    def bundle_bytes(self) -> int:
        """B: bytes of one token, all layers."""
        return sum(self.record_bytes(n) for n in self.numbers)

    def record_bytes(self, n: int) -> int:
        """Bytes of one layer's record of n numbers."""
        if self.dtype in FLOATS:
            return n * jnp.dtype(self.dtype).itemsize
        codes = n if self.dtype == "int8" else -(-n // 2)
        return codes + 4 * self.scales(n)

    def scales(self, n: int) -> int:
        """Scales of a record of n numbers."""
        return -(-n // (self.scale_group or n))


def encode(layout: Layout, rows_RLW: jax.Array, basis: Basis = ()) -> jax.Array:
    """Rows float32 as they are stored: [R, L, W] of the layout's dtype when plain, else bundles
    uint8 [R, B]."""
    if layout.plain:
        return rows_RLW.astype(layout.dtype)
    if layout.ranks is None:
        return _pack(layout, rows_RLW).reshape(len(rows_RLW), layout.bundle_bytes)
    records = []
    for i, basis_rW in enumerate(basis):
        numbers_Rr = jnp.matmul(rows_RLW[:, i], basis_rW.T, precision="highest")
        records.append(_pack(layout, numbers_Rr))
    return jnp.concatenate(records, axis=1)


def decode(
    layout: Layout, stored: jax.Array, basis: Basis = (), dtype: str = "float32"
) -> jax.Array:
    """rows_LRW in ``dtype``, of what :func:`encode` or :func:`host_view` gave."""
    if layout.plain:
        return jnp.swapaxes(stored, 0, 1).astype(dtype)
    if layout.ranks is None:
        records_RLb = stored.reshape(len(stored), layout.layers, -1)
        return jnp.swapaxes(_unpack(layout, records_RLb, layout.width), 0, 1).astype(dtype)
    rows, start = [], 0
    for basis_rW, n in zip(basis, layout.ranks, strict=True):
        record_Rb = stored[:, start : start + layout.record_bytes(n)]
        row_RW = jnp.matmul(_unpack(layout, record_Rb, n), basis_rW, precision="highest")
        rows.append(row_RW.astype(dtype))
        start += record_Rb.shape[1]
    return jnp.stack(rows)


# for callers that are not compiled themselves
jitted_decode = jax.jit(decode, static_argnums=(0, 3))


def host_view(layout: Layout, bundles_RB: np.ndarray) -> np.ndarray:
    """C-contiguous uint8 bundles in the form that :func:`decode` takes: a view, not a copy."""
    if not layout.plain:
        return bundles_RB
    shape = len(bundles_RB), layout.layers, layout.width
    return bundles_RB.view(jnp.dtype(layout.dtype)).reshape(shape)


def _pack(layout: Layout, x: jax.Array) -> jax.Array:
    """Numbers float32 [..., n] to records uint8 [..., bytes]."""
    if layout.dtype in FLOATS:
        return _as_bytes(x.astype(layout.dtype))
    n, limit = x.shape[-1], CODE_LIMIT[layout.dtype]
    grouped = _group(layout, x)
    scale = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True) / limit
    # clipped because the scale of subnormal numbers is itself too coarse
    rounded = jnp.clip(jnp.round(grouped / scale), -limit, limit)
    codes = jnp.where(scale > 0, rounded, 0).astype(jnp.int8)
    codes = codes.reshape(*x.shape[:-1], -1)[..., :n]
    if layout.dtype == "int4":
        pairs = _padded(codes, 2).reshape(*x.shape[:-1], -1, 2)
        codes = (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)
    code_bytes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return jnp.concatenate([code_bytes, _as_bytes(scale[..., 0])], axis=-1)


def _unpack(layout: Layout, records: jax.Array, n: int) -> jax.Array:
    """Records uint8 [..., bytes] to their n numbers, float32 [..., n]."""
    if layout.dtype in FLOATS:
        return _from_bytes(records, layout.dtype).astype(jnp.float32)
    split = records.shape[-1] - 4 * layout.scales(n)
    codes = jax.lax.bitcast_convert_type(records[..., :split], jnp.int8)
    if layout.dtype == "int4":
        low, high = (codes << 4) >> 4, codes >> 4  # arithmetic shifts spread the sign
        codes = jnp.stack([low, high], axis=-1).reshape(*codes.shape[:-1], -1)[..., :n]
    scale = _from_bytes(records[..., split:], "float32")[..., None]
    x = _group(layout, codes.astype(jnp.float32)) * scale
    return x.reshape(*codes.shape[:-1], -1)[..., :n]


def _group(layout: Layout, x: jax.Array) -> jax.Array:
    """[..., n] as [..., scales, numbers that share one], the last share padded with zeros."""
    size = layout.scale_group or x.shape[-1]
    return _padded(x, size).reshape(*x.shape[:-1], -1, size)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])


def _as_bytes(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _from_bytes(data: jax.Array, dtype: str) -> jax.Array:
    size = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, size), jnp.dtype(dtype))
