"""``flexmemory copy``: a store to another place."""

from flexmemory.cli.flags import Parser


def run(argv: list[str]) -> int:
    parser = Parser(
        "flexmemory copy",
        "Copy a TKV store between local paths, s3://, gs:// and (as source) http(s)://, checked on"
        " the way. An interrupted copy is finished by the same command.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="path or URL of the store")
    add("destination", metavar="DST", help="path or URL of the copy")
    help_ = "replace another store, or an unfinished one, at DST"
    add("--overwrite", action="store_true", help=help_)
    help_ = (
        "read every file at DST back and copy damaged ones again; without it files that are there"
        " with the right size are trusted"
    )
    add("--deep", action="store_true", help=help_)
    args = parser.parse_args(argv)

    from flexmemory.tkv.copy import copy

    result = copy(args.source, args.destination, overwrite=args.overwrite, deep=args.deep)
    count, size, seconds = (result[name] for name in ("copied_files", "copied_bytes", "seconds"))
    parts = [f"{count} copied and verified ({size:,} bytes)"] if count else []
    if kept := result["files"] - 1 - count:
        how = "read and verified" if result["read_back"] else "by size; --deep reads them"
        parts.append(f"{kept} were there already, {how}")
    print(
        f"{args.destination}: {result['files']} files, {result['bytes']:,} bytes:"
        f" {'; '.join(parts)}; {seconds:.1f} s, {size / seconds / 1e6:,.0f} MB/s"
    )
    return 0
