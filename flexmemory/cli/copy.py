"""``flexmemory copy``: a store to another place."""

from flexmemory.cli.flags import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        "flexmemory copy",
        "Copy a TKV store between local paths, s3://, gs:// and (as source) http(s)://, checked on"
        " the way. An interrupted copy is finished by the same command.",
    )
    parser.add_argument("source", metavar="SRC", help="path or URL of the store")
    parser.add_argument("destination", metavar="DST", help="path or URL of the copy")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace another store, or an unfinished one, at DST",
    )
    parser.add_argument(
        "--deep",
        action="store_true",
        help=(
            "read every file at DST back and copy damaged ones again; without it files "
            "that are there with the right size are trusted"
        ),
    )
    args = parser.parse_args(argv)

    from flexmemory.tkv.copy import copy

    made = copy(args.source, args.destination, overwrite=args.overwrite, deep=args.deep)
    kept = made["files"] - 1 - made["copied_files"]
    parts = (
        [f"{made['copied_files']} copied and verified ({made['copied_bytes']:,} bytes)"]
        if made["copied_files"]
        else []
    )
    if kept:
        parts.append(
            f"{kept} were there already, "
            + ("read and verified" if made["read_back"] else "by size; --deep reads them")
        )
    print(
        f"{args.destination}: {made['files']} files, {made['bytes']:,} bytes: {'; '.join(parts)};"
        f" {made['seconds']:.1f} s, {made['copied_bytes'] / made['seconds'] / 1e6:,.0f} MB/s"
    )
    return 0
