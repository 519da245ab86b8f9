"""The options of `vlv info`."""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="what a checkpoint holds",
        description="Prints what a folder, a Hub repository or a checkpoint of the authors' code holds: stage, parts, "
        "parameters, precision, licences, files. Reads the headers of weight files alone, and downloads no weights.",
    )
    parser.add_argument("source", nargs="?", metavar="DIR_OR_REPO", help="folder, file or Hub repo id")
    parser.add_argument(
        "--formats",
        action="store_true",
        help="print the image formats that can be read here, in place of a checkpoint",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo")
    parser.add_argument("--token", help="Hub token, for a private repo")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run="info:run")
