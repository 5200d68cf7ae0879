"""`python -m xar_cli` is the same program as `xar`."""

from xar_cli.cli.app import main

if __name__ == "__main__":
    main()
