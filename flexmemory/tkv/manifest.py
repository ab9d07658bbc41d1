"""tkv.json: the manifest written, read, and checked against itself."""

import contextlib
import dataclasses
import hashlib
import json

from flexmemory.config import Config, from_dict
from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.encoding import DTYPES, FLOATS
from flexmemory.tkv.format import VERSION, LayerError, Manifest, Provenance, TokenizerInfo
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import File, Location, refuse
from flexmemory.tkv.storage.target import COPY_MARK, MANIFEST, partial_file

FORMAT = "tkv"
GROUP_FIELDS = ("name", "layers", "width", "ranks", "bundle_bytes", "shards", "bytes")
MEND = "export the run again"


def to_json(manifest: Manifest) -> dict:
    """The manifest as it is written, checksum included."""
    m = manifest
    body = {
        "format": FORMAT,
        "version": VERSION,
        "flexmemory": m.flexmemory,
        "pattern": m.model.pattern,
        "model": dataclasses.asdict(m.model),
        "vocab_size": m.vocab_size,
        "dtype": m.dtype,
        "scale_group": m.scale_group,
        "rank_error": m.rank_error,
        "byte_order": "little",
        "shard_rows": m.shard_rows,
        "fold_rows": m.fold_rows,
        "layers": format.model_layers(m.model),
        "groups": [{name: getattr(g, name) for name in GROUP_FIELDS} for g in m.groups],
        "table_bytes": m.table_bytes,
        "backbone": {"dtype": "float32"},
        "tokenizer": {"file": format.TOKENIZER, **dataclasses.asdict(m.tokenizer)},
        "source": dataclasses.asdict(m.source),
        "errors": m.errors and [dataclasses.asdict(error) for error in m.errors],
        "files": [dataclasses.asdict(file) for file in m.files],
    }
    body = json.loads(json.dumps(body))  # tuples become lists, as a reader sees them
    return {**body, "crc32": json_crc32(body)}


def to_bytes(manifest: Manifest) -> bytes:
    return (json.dumps(to_json(manifest), indent=1) + "\n").encode()


def from_json(content: object, origin: str) -> Manifest:
    """Checks a decoded tkv.json. Raises UserError naming the field and what to do."""

    def wrong(what: str, mend: str = MEND) -> UserError:
        return UserError(f"{origin}: {what}; {mend}")

    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise wrong("not the manifest of a TKV store")
    other = f"{MEND} or use the flexmemory that wrote it"
    if (version := content.get("version")) != VERSION:
        what = f"version {version!r}, this flexmemory reads {VERSION}"
        raise wrong(what, f"{other} ({content.get('flexmemory')})")
    body = {name: value for name, value in content.items() if name != "crc32"}
    if (crc := content.get("crc32")) != json_crc32(body):
        raise wrong(f"crc32 {crc!r} does not fit the content, it was changed or damaged")
    try:
        manifest = _parse(body)
        if nonsense := _wrong(manifest):
            raise wrong(nonsense)
        written = to_json(manifest)
        # a field that the config has gained since then takes its default, which must mean what was
        # done before
        written["model"] = {k: v for k, v in written["model"].items() if k in body["model"]}
        if unknown := body.keys() - written.keys():
            raise wrong(f"unknown field {', '.join(sorted(unknown))}", other)
        if bad := [name for name in written if name != "crc32" and written[name] != body[name]]:
            raise wrong(f"{', '.join(bad)} not as the model, dtype and shard_rows say")
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise wrong(f"missing or malformed field ({error})") from None
    return manifest


def _parse(body: dict) -> Manifest:
    model, errors = from_dict({"model": body["model"]}).model, body["errors"]
    rank_of: dict[int, int] = {}
    for group in body["groups"]:
        rank_of |= zip(group["layers"], group["ranks"], strict=True) if group["ranks"] else ()
    names = ("dtype", "shard_rows", "fold_rows", "scale_group", "rank_error", "flexmemory")
    return Manifest(
        model=model,
        tokenizer=TokenizerInfo(**{k: v for k, v in body["tokenizer"].items() if k != "file"}),
        source=Provenance(**body["source"]),
        ranks=tuple(rank_of[i] for i in format.memory_layers(model)) if rank_of else None,
        files=tuple(File(**file) for file in body["files"]),
        errors=None if errors is None else tuple(LayerError(**error) for error in errors),
        **{name: body[name] for name in names},
    )


def _wrong(m: Manifest) -> str | None:
    """What makes no sense in the fields from which all others follow, or in the list of files."""
    if m.dtype not in DTYPES:
        return f"dtype {m.dtype!r} is not one of {', '.join(DTYPES)}"
    if m.vocab_size < 1 or m.shard_rows < 1 or m.shard_rows & (m.shard_rows - 1):
        return f"shard_rows {m.shard_rows} is not a power of two"
    if m.scale_group < 0 or (m.scale_group and m.dtype in FLOATS):
        return f"scale_group {m.scale_group} does not go with dtype {m.dtype}"
    if bad := [rank for g in m.groups for rank in g.ranks or () if not 1 <= rank <= g.width]:
        return f"groups: rank {bad[0]} is not between 1 and the rows' width"
    sizes = {file.name: file.bytes for file in m.files}
    if list(sizes) != sorted(sizes) or len(sizes) != len(m.files):
        return "files: not sorted by name, or a name twice"
    shards, fixed = format.expected_files(m), format.fixed_names(m)
    for name in (*shards, *fixed):
        if name not in sizes or sizes[name] != shards.get(name, sizes[name]):
            found = f"{sizes[name]} bytes" if name in sizes else "missing"
            return f"files: {name} is {found}, not as the model, dtype and shard_rows say"
    for name in sorted(sizes.keys() - shards.keys() - {*fixed, format.COUNTS}):
        if not format.BACKBONE_NAME.fullmatch(name):
            return f"files: {name!r} is no file of a store"
    return None


def read_manifest(location: Location) -> Manifest:
    """The manifest of a complete store. Raises UserError where there is no such store."""
    try:
        content = json.loads(location.read(MANIFEST))
    except FileNotFoundError:
        if what := unfinished(location):
            mend = f"run the same `flexmemory {what}` again to finish it"
            raise UserError(f"{location.url}: an unfinished {what}, not a store; {mend}") from None
        what, mend = f"no TKV store here (no {MANIFEST})", "write one with `flexmemory export`"
        raise UserError(f"{location.url}: {what}; {mend}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refuse(location, MANIFEST, f"not a readable JSON file ({error})", MEND) from None
    return from_json(content, f"{location.url}/{MANIFEST}")


def unfinished(location: Location) -> str | None:
    """ "export" or "copy" where the mark of one that has not ended is."""
    for name, what in ((partial_file(0), "export"), (COPY_MARK, "copy")):
        with contextlib.suppress(FileNotFoundError):
            location.read(name, 0, 1)
            return what
    return None


def identity(manifest: Manifest) -> dict:
    """What must agree for shards of two exports to be the same bytes."""
    body = to_json(manifest)
    names = ("version", "model", "dtype", "shard_rows", "fold_rows", "tokenizer")
    return {name: body[name] for name in (*names, "scale_group", "rank_error")} | {
        "ranks": manifest.ranks and list(manifest.ranks) if manifest.rank_error is None else None,
        # logging intervals, which are in the hash of the config, do not change a row
        "source": {name: v for name, v in body["source"].items() if name != "config_hash"},
    }


def json_crc32(body: dict) -> int:
    """CRC-32 of the JSON with sorted keys, no white space, non-ASCII escaped."""
    return crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def config_hash(config: Config) -> str:
    """First 16 hex digits of a sha256 over the whole configuration."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
