"""tkv.json: the manifest written, read, and checked against itself."""

import dataclasses
import hashlib
import json

from flexmemory.config import Config, from_dict
from flexmemory.errors import UserError
from flexmemory.tkv import format
from flexmemory.tkv.encoding import DTYPES, FLOATS
from flexmemory.tkv.format import (
    BACKBONE_NAME,
    COPY_MARK,
    COUNTS,
    MANIFEST,
    TOKENIZER,
    VERSION,
    File,
    LayerError,
    Manifest,
    Source,
    TokenizerInfo,
)
from flexmemory.tkv.storage.crc import crc32
from flexmemory.tkv.storage.location import Location

FORMAT = "tkv"


def to_json(manifest: Manifest) -> dict:
    """The manifest as it is written, checksum included."""
    m = manifest
    names = ("name", "layers", "width", "bundle_bytes", "shards", "bytes")
    groups = [
        {name: getattr(g, name) for name in names} | {"ranks": g.layout.ranks} for g in m.groups
    ]
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
        "groups": groups,
        "table_bytes": m.table_bytes,
        "backbone": {"dtype": "float32"},
        "tokenizer": {"file": TOKENIZER, **dataclasses.asdict(m.tokenizer)},
        "source": dataclasses.asdict(m.source),
        "errors": m.errors and [dataclasses.asdict(error) for error in m.errors],
        "files": [dataclasses.asdict(file) for file in m.files],
    }
    body = json.loads(json.dumps(body))  # tuples become lists, as a reader sees them
    return {**body, "crc32": json_crc32(body)}


def from_json(content: object, origin: str) -> Manifest:
    """Checks a decoded tkv.json. Raises UserError naming the field and what to do."""
    mend = "export the run again"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{origin}: not the manifest of a TKV store (format {_get(content, 'format')!r});"
            f" {mend}"
        )
    if content.get("version") != VERSION:
        raise UserError(
            f"{origin}: version {content.get('version')!r}, this flexmemory reads {VERSION}; {mend}"
            f" or use the flexmemory that wrote it ({content.get('flexmemory')})"
        )
    body = {name: value for name, value in content.items() if name != "crc32"}
    if content.get("crc32") != json_crc32(body):
        raise UserError(
            f"{origin}: crc32 {content.get('crc32')!r} does not fit the content, it was changed or"
            f" damaged; {mend}"
        )
    try:
        manifest = _parse(body)
        _check(manifest, origin, mend)
        written = to_json(manifest)
        # a field that the config has gained since then takes its default, which must mean what was
        # done before
        written["model"] = {
            name: value for name, value in written["model"].items() if name in body["model"]
        }
        if unknown := body.keys() - written.keys():
            raise UserError(
                f"{origin}: unknown field {', '.join(sorted(unknown))}; {mend} or use the"
                " flexmemory that wrote it"
            )
        if wrong := [name for name in written if name != "crc32" and written[name] != body[name]]:
            raise UserError(
                f"{origin}: {', '.join(wrong)} not as the model, dtype and shard_rows say; {mend}"
            )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{origin}: missing or malformed field ({error}); {mend}") from None
    return manifest


def _parse(body: dict) -> Manifest:
    model, errors = from_dict({"model": body["model"]}).model, body["errors"]
    rank_of = {
        layer: rank
        for group in body["groups"]
        if group["ranks"]
        for layer, rank in zip(group["layers"], group["ranks"], strict=True)
    }
    ranks = tuple(rank_of[layer] for layer in format.memory_layers(model)) if rank_of else None
    return Manifest(
        model=model,
        dtype=body["dtype"],
        shard_rows=body["shard_rows"],
        fold_rows=body["fold_rows"],
        tokenizer=TokenizerInfo(**{k: v for k, v in body["tokenizer"].items() if k != "file"}),
        source=Source(**body["source"]),
        scale_group=body["scale_group"],
        ranks=ranks,
        rank_error=body["rank_error"],
        files=tuple(File(**file) for file in body["files"]),
        errors=None if errors is None else tuple(LayerError(**error) for error in errors),
        flexmemory=body["flexmemory"],
    )


def _check(m: Manifest, origin: str, mend: str) -> None:
    if m.dtype not in DTYPES:
        raise UserError(f"{origin}: dtype {m.dtype!r} is not one of {', '.join(DTYPES)}; {mend}")
    if m.vocab_size < 1 or m.shard_rows < 1 or m.shard_rows & (m.shard_rows - 1):
        raise UserError(f"{origin}: shard_rows {m.shard_rows} is not a power of two; {mend}")
    if m.scale_group < 0 or (m.scale_group and m.dtype in FLOATS):
        raise UserError(
            f"{origin}: scale_group {m.scale_group} does not go with dtype {m.dtype}; {mend}"
        )
    if bad := [rank for g in m.groups for rank in g.layout.ranks or () if not 1 <= rank <= g.width]:
        raise UserError(
            f"{origin}: groups: rank {bad[0]} is not between 1 and the rows' width; {mend}"
        )
    names = {file.name: file.bytes for file in m.files}
    if list(names) != sorted(names) or len(names) != len(m.files):
        raise UserError(f"{origin}: files: not sorted by name, or a name twice; {mend}")
    shards, rest = format.expected_files(m), {*format.fixed_names(m), COUNTS}
    for name in (*shards, *format.fixed_names(m)):
        if name not in names or names[name] != shards.get(name, names[name]):
            raise UserError(
                f"{origin}: files: {name} is"
                f" {'missing' if name not in names else f'{names[name]} bytes'}, not as the model,"
                f" dtype and shard_rows say; {mend}"
            )
    for name in names:
        if name not in shards and name not in rest and not BACKBONE_NAME.fullmatch(name):
            raise UserError(f"{origin}: files: {name!r} is no file of a store; {mend}")


def read_manifest(location: Location) -> Manifest:
    """The manifest of a complete store. Raises UserError where there is none, a partial export, or
    another version.
    """
    try:
        content = json.loads(location.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        if what := unfinished(location):
            raise UserError(
                f"{location.url}: an unfinished {what}, not a store; run the same `flexmemory"
                f" {what}` again to finish it"
            ) from None
        raise UserError(
            f"{location.url}: no TKV store here (no {MANIFEST}); write one with `flexmemory export"
            f" --workdir=RUN --out={location.url}`"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{location.url}/{MANIFEST}: not a readable JSON file ({error}); export the run again"
        ) from None
    return from_json(content, f"{location.url}/{MANIFEST}")


def unfinished(location: Location) -> str | None:
    """ "export" or "copy" where the mark of one that has not ended is; host 0 of an export always
    has one.
    """
    for name, what in ((format.partial_file(0), "export"), (COPY_MARK, "copy")):
        try:
            location.read(name, 0, 1)
            return what
        except FileNotFoundError:
            continue
        except NotADirectoryError:
            return None
    return None


def json_crc32(body: dict) -> int:
    """CRC-32 of the JSON with sorted keys, no white space, non-ASCII escaped."""
    return crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def config_hash(config: Config) -> str:
    """First 16 hex digits of a sha256 over the whole configuration."""
    return hashlib.sha256(
        json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
    ).hexdigest()[:16]


def _get(content, name):
    return content.get(name) if isinstance(content, dict) else None
