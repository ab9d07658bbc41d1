"""``flexmemory export``: fold a run into a TKV store."""

from typing import Any

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError

TABLE_LAYERS = 32  # more layers than this are not listed one by one
HELP = {
    "--workdir": "run folder written by `flexmemory train`",
    "--out": "path or URL of the store: a directory, s3://bucket/prefix, gs://bucket/prefix",
    "--dtype": "of the rows: float32, bfloat16, float16, int8 or int4 (default %(default)s)",
    "--scale_group": "int8 and int4: numbers that share a scale, 0 for a whole row (default)",
    "--rank": "low rank: columns kept of every layer, or a share of its width such as 0.5",
    "--rank_error": "low rank: of every layer the smallest rank with at most this relative error,"
    " such as 0.05",
    "--step": "checkpoint to export (default: the latest)",
    "--shard_rows": "tokens in one shard file, a power of two (default: about 32 MiB of rows);"
    " also called --block_rows",
    "--host": "number of this process where several share the export, from 0",
    "--hosts": "how many processes share the export",
    "--overwrite": "replace another store at --out",
}


def run(argv: list[str]) -> int:
    parser = Parser(
        "flexmemory export",
        "Fold every memory layer of a run over the whole vocabulary into a TKV store. An"
        " interrupted export is finished by the same command.",
    )

    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, help=HELP[names[0]], **options)

    add("--workdir", required=True)
    add("--out", required=True)
    add("--dtype", default="float32")
    add("--scale_group", type=int, default=0)
    add("--rank")
    add("--rank_error", type=float)
    add("--step", type=int)
    add("--shard_rows", "--block_rows", type=int)
    add("--host", type=int)
    add("--hosts", type=int)
    add("--overwrite", action="store_true")
    options = vars(parser.parse_args(argv))
    options["rank"] = parse_rank(options["rank"])

    from flexmemory.tkv.export import export

    result, out = export(**options), options["out"]
    if result["complete_before"]:
        print(f"{out}: already complete")
    else:
        resumed = result["resumed_rows"]
        more = f", {resumed:,} rows were there already" if resumed else ""
        print(f"{out}: {result['seconds']:.1f} s, {result['rows_per_s']:,.0f} rows/s{more}")
    print(table(result))
    return 0


def parse_rank(text: str | None) -> int | float | None:
    """A whole number of columns, or a share of the width, which has a point."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise UserError(
            f"--rank: {text!r} is not a number; give a whole number of columns, or a share such"
            " as 0.5"
        ) from None


def table(result: dict) -> str:
    """The sizes and errors of an export (see ``export.sizes``) for the terminal."""

    def size(name: str, count: int, more: str = "") -> str:
        return f"  {name:<28}{count:>18,} bytes{more}"

    total, layers = result["table_bytes"], result["layers"]
    scaled = f", a scale per {result['scale_group']}" if result["scale_group"] else ""
    ranks = [layer["rank"] for layer in layers if layer["rank"]]
    low = f", rank {min(ranks)}" if ranks else ""
    low += f" to {max(ranks)}" if ranks and max(ranks) > min(ranks) else ""
    lines = [size(f"rows, {result['dtype']}{scaled}{low}", total)]
    for dtype in ("float32", "bfloat16"):
        plain = result[f"{dtype}_bytes"]
        if total and total != plain:
            lines.append(size(f"  as {dtype}", plain, f"   {plain / total:.2f}x"))
    if result["basis_bytes"]:
        lines.append(size("basis", result["basis_bytes"]))
    lines.append(size("backbone", result["backbone_bytes"]))
    wasted = [layer for layer in layers if layer["rank"] and layer["rank"] > layer["useful_rank"]]
    if wasted:
        lines.append(
            f"  note: rank {wasted[0]['rank']} of layer {wasted[0]['layer']} saves nothing: numbers"
            f" and basis are as large as the rows above rank {wasted[0]['useful_rank']} (V*W/(V+W))"
        )
    if errors := [layer for layer in layers if layer["relative_rms"] is not None]:
        rms = [layer["relative_rms"] for layer in errors]
        lines.append(
            f"  error of a row, relative RMS  worst {max(rms):.2e}, mean {sum(rms) / len(rms):.2e}"
        )
        for layer in errors if len(errors) <= TABLE_LAYERS else ():
            rank = f"rank {layer['rank']:<6}" if layer["rank"] else ""
            lines.append(
                f"    layer {layer['layer']:<4}{rank}relative RMS {layer['relative_rms']:.2e} "
                f" largest {layer['max_abs']:.2e}"
            )
    return "\n".join(lines)
