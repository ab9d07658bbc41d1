"""``flexmemory export``: fold a run into a TKV store."""

from flexmemory.cli.flags import Parser
from flexmemory.errors import UserError

TABLE_LAYERS = 32  # more layers than this are not listed one by one


def run(argv: list[str]) -> int:
    parser = Parser(
        "flexmemory export",
        "Fold every memory layer of a run over the whole "
        "vocabulary into a TKV store. An interrupted export is finished by the same command.",
    )
    parser.add_argument("--workdir", required=True, help="run folder written by `flexmemory train`")
    parser.add_argument(
        "--out",
        required=True,
        help="path or URL of the store: a directory, s3://bucket/prefix, gs://bucket/prefix",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the rows: float32, bfloat16, float16, int8 or int4 (default %(default)s)",
    )
    parser.add_argument(
        "--scale_group",
        type=int,
        default=0,
        help="int8 and int4: numbers that share a scale, 0 for a whole row (default)",
    )
    parser.add_argument(
        "--rank", help="low rank: columns kept of every layer, or a share of its width such as 0.5"
    )
    parser.add_argument(
        "--rank_error",
        type=float,
        help=(
            "low rank: of every layer the smallest rank with at most this relative error, such as"
            " 0.05"
        ),
    )
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the latest)")
    parser.add_argument(
        "--block_rows",
        type=int,
        help="tokens in one shard file, a power of two (default: about 32 MiB of rows)",
    )
    parser.add_argument(
        "--host", type=int, help="number of this process where several share the export, from 0"
    )
    parser.add_argument("--hosts", type=int, help="how many processes share the export")
    parser.add_argument("--overwrite", action="store_true", help="replace another store at --out")
    args = parser.parse_args(argv)

    from flexmemory.tkv.export import export

    made = export(
        args.workdir,
        args.out,
        dtype=args.dtype,
        scale_group=args.scale_group,
        rank=parse_rank(args.rank),
        rank_error=args.rank_error,
        step=args.step,
        block_rows=args.block_rows,
        host=args.host,
        hosts=args.hosts,
        overwrite=args.overwrite,
    )
    if made["complete_before"]:
        print(f"{args.out}: already complete")
    else:
        resumed = (
            f", {made['resumed_rows']:,} rows were there already" if made["resumed_rows"] else ""
        )
        print(f"{args.out}: {made['seconds']:.1f} s, {made['rows_per_s']:,.0f} rows/s{resumed}")
    print(table(made))
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


def table(made: dict) -> str:
    """The sizes and errors of an export (see ``export.sizes``) for the terminal."""

    def size(name: str, count: int, more: str = "") -> str:
        return f"  {name:<28}{count:>18,} bytes{more}"

    bytes_, layers = made["table_bytes"], made["layers"]
    scaled = f", a scale per {made['scale_group']}" if made["scale_group"] else ""
    ranks = [layer["rank"] for layer in layers if layer["rank"]]
    low = (
        f", rank {min(ranks)}" + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")
        if ranks
        else ""
    )
    lines = [size(f"rows, {made['dtype']}{scaled}{low}", bytes_)]
    for dtype in ("float32", "bfloat16"):
        if bytes_ and bytes_ != made[f"{dtype}_bytes"]:
            lines.append(
                size(
                    f"  as {dtype}",
                    made[f"{dtype}_bytes"],
                    f"   {made[f'{dtype}_bytes'] / bytes_:.2f}x",
                )
            )
    if made["basis_bytes"]:
        lines.append(size("basis", made["basis_bytes"]))
    lines.append(size("backbone", made["backbone_bytes"]))
    if wasted := [
        layer for layer in layers if layer["rank"] and layer["rank"] > layer["useful_rank"]
    ]:
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
