"""``flexmemory export``: fold a run into a TKV store."""


from flexmemory.cli.flags import Parser
from flexmemory.tkv.format import DTYPES


def run(argv: list[str]) -> int:
    parser = Parser("flexmemory export", "Fold every memory layer of a run over the whole "
                                     "vocabulary into a TKV store. An interrupted export is finished by the same command.")
    parser.add_argument("--workdir", required=True, help="run folder written by `flexmemory train`")
    parser.add_argument("--out", required=True, help="directory of the store")
    parser.add_argument("--dtype", default="float32", help=f"of the rows: {', '.join(DTYPES)} (default %(default)s)")
    parser.add_argument("--step", type=int, help="checkpoint to export (default: the latest)")
    parser.add_argument("--block_rows", type=int, help="tokens in one shard file, a power of two (default: about 32 MiB of rows)")
    parser.add_argument("--overwrite", action="store_true", help="replace another store at --out")
    args = parser.parse_args(argv)

    from flexmemory.tkv.export import export

    made = export(args.workdir, args.out, dtype=args.dtype, step=args.step, block_rows=args.block_rows, overwrite=args.overwrite)
    size = f"{made['table_bytes']:,} bytes of rows, {made['backbone_bytes']:,} of backbone"
    if made["complete_before"]:
        print(f"{args.out}: already complete, {size}")
    else:
        resumed = f", {made['resumed_rows']:,} rows were there already" if made["resumed_rows"] else ""
        print(f"{args.out}: {size}, {made['seconds']:.1f} s, {made['rows_per_s']:,.0f} rows/s{resumed}")
    return 0
