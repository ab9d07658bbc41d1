"""A reader of the TKV store from docs/formats.md alone: json and NumPy, no flexmemory, no JAX, no
zarr.
"""

import json
import zlib
from pathlib import Path

import numpy as np

FLOATS = {"float32": 4, "bfloat16": 2, "float16": 2}


def read_manifest(store: Path) -> dict:
    manifest = json.loads((store / "tkv.json").read_bytes())
    assert manifest["format"] == "tkv" and manifest["version"] == 2
    body = {k: v for k, v in manifest.items() if k != "crc32"}
    assert manifest["crc32"] == zlib.crc32(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    )
    for file in manifest["files"]:
        data = (store / file["name"]).read_bytes()
        assert len(data) == file["bytes"] and zlib.crc32(data) == file["crc32"]
    return manifest


def floats(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"float32": "<f4", "float16": "<f2"}[dtype]).astype(np.float32)


def numbers(record: bytes, n: int, dtype: str, scale_group: int) -> np.ndarray:
    """The n numbers of one layer's record."""
    if dtype in FLOATS:
        return floats(record, dtype)
    size = n if dtype == "int8" else (n + 1) // 2
    codes = np.frombuffer(record[:size], np.int8)
    if dtype == "int4":
        codes = np.stack([(codes << 4) >> 4, codes >> 4], axis=1).ravel()[:n]
    scales = np.frombuffer(record[size:], "<f4")
    return codes * scales[np.arange(n) // (scale_group or n)]


def decode(found: bytes, store: Path, manifest: dict, group: dict) -> np.ndarray:
    """rows_LW float32 of one bundle."""
    dtype, ranks, rows, at = manifest["dtype"], group.get("ranks"), [], 0
    basis = read_tensors(store / "basis.safetensors") if ranks else {}
    for layer, n in zip(
        group["layers"], ranks or [group["width"]] * len(group["layers"]), strict=True
    ):
        g = manifest.get("scale_group") or n
        size = (
            n * FLOATS[dtype]
            if dtype in FLOATS
            else (n if dtype == "int8" else (n + 1) // 2) + 4 * -(-n // g)
        )
        row = numbers(found[at : at + size], n, dtype, g)
        rows.append(row @ basis[f"layers.{layer}"] if ranks else row)
        at += size
    assert at == len(found)
    return np.stack(rows)


def bundle(store: Path, manifest: dict, group: dict, token: int) -> np.ndarray:
    """rows_LW float32 of one token, by the offset formula; index and checksum are compared."""
    s, size = manifest["shard_rows"], group["bundle_bytes"]
    shard, place = divmod(token, s)
    plain = manifest["dtype"] in FLOATS and not group.get("ranks")
    data = (store / f"rows/{group['name']}/c/{shard}/{'0/0' if plain else '0'}").read_bytes()
    present = min(s, manifest["vocab_size"] - shard * s)
    assert len(data) == present * size + 16 * s + 4
    index = np.frombuffer(data, "<u8", count=2 * s, offset=present * size).reshape(s, 2)
    assert (index[present:] == 2**64 - 1).all()
    assert crc32c(data[present * size : -4]) == int.from_bytes(data[-4:], "little")
    assert index[place].tolist() == [place * size, size]
    found = data[place * size : (place + 1) * size]
    checksums = np.fromfile(store / f"checksums/{group['name']}/c/{shard}", "<u4")
    assert len(checksums) == s and zlib.crc32(found) == checksums[place]
    return decode(found, store, manifest, group)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """safetensors: uint64 length of a JSON header, the header, the bytes that it points into."""
    data, tensors = path.read_bytes(), {}
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert entry["dtype"] == "F32"
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[start + begin : start + end], "<f4").reshape(
                entry["shape"]
            )
    return tensors


def read_backbone(store: Path, manifest: dict) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for path in sorted((store / "backbone").iterdir())
        for name, tensor in read_tensors(path).items()
    }


def read_counts(store: Path) -> np.ndarray:
    """npy 1.0: magic, version, uint16 length of a header, the header, the numbers."""
    data = (store / "counts.npy").read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00"
    return np.frombuffer(data, "<u8", offset=10 + int.from_bytes(data[8:10], "little"))


def silu(a):
    return a / (1 + np.exp(-a))


def forward(store: Path, ids: list[int]) -> np.ndarray:
    """logits_TV of one text in float64."""
    manifest = read_manifest(store)
    model, groups = manifest["model"], {group["name"]: group for group in manifest["groups"]}
    weights = {name: w.astype(np.float64) for name, w in read_backbone(store, manifest).items()}
    rows = {
        (name, t): bundle(store, manifest, group, t).astype(np.float64)
        for name, group in groups.items()
        for t in set(ids)
    }

    def rms(x, scale):
        return (
            x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model["norm_eps"]) * weights[scale]
        )

    def swiglu(h, prefix):
        return (silu(h @ weights[prefix + "gate"]) * (h @ weights[prefix + "up"])) @ weights[
            prefix + "down"
        ]

    def rope(u_TnH):
        half = u_TnH.shape[-1] // 2
        angle = np.arange(len(ids))[:, None, None] * model["rope_base"] ** (-np.arange(half) / half)
        a, b = u_TnH[..., :half], u_TnH[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
        )

    def attention(h, prefix):
        q, k, v = (np.einsum("td,dnh->tnh", h, weights[prefix + name]) for name in "qkv")
        q, k, share = rope(q), rope(k), q.shape[1] // k.shape[1]
        out = np.zeros_like(h)
        for n in range(q.shape[1]):
            score = q[:, n] @ k[:, n // share].T / np.sqrt(q.shape[-1])
            score[np.triu_indices(len(ids), 1)] = -np.inf
            weight = np.exp(score - score.max(-1, keepdims=True))
            out += (
                weight / weight.sum(-1, keepdims=True) @ v[:, n // share] @ weights[prefix + "o"][n]
            )
        return out

    x = weights["embed"][ids]
    for i, layer in enumerate(manifest["layers"]):
        p = f"layers.{i}."
        row = (
            np.stack([rows[layer["group"], t][layer["place"]] for t in ids])
            if layer["group"]
            else None
        )
        y = x + attention(rms(x, p + "attn_norm.scale"), p + "attn.")
        kind = layer["kind"]
        if kind in ("dense", "parallel"):
            new = y + swiglu(rms(y if kind == "dense" else x, p + "ffn_norm.scale"), p + "ffn.")
        elif kind in ("attn_only", "memoryllm"):
            new = y if row is None else y + row
        elif kind == "flex":
            h = rms(x if model["ffn_c_input"] == "parallel" else y, p + "ffn_norm.scale")
            if layer["square"] == 1:
                new = y + row + h @ weights[p + "ffn.down"]
            elif layer["square"] == 2:
                new = y + row + silu(h @ weights[p + "ffn.gate"]) @ weights[p + "ffn.down"]
            else:
                new = y + row + swiglu(h, p + "ffn.")
        else:
            h = rms(y, p + "ffn_norm.scale")
            inner = {
                "stem": lambda: silu(h @ weights[p + "gate"]) * row,
                "stem-gate": lambda: silu(row) * (h @ weights[p + "up"]),
                "stem-dagger": lambda: (
                    silu(h @ weights[p + "gate"]) * (h @ weights[p + "up"] + row)
                ),
            }[kind]()
            new = y + inner @ weights[p + "down"]
        x = new
    return rms(x, "norm.scale") @ (weights["embed"].T if model["tied_head"] else weights["head"])
