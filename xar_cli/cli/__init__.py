"""The `xar` command: one file per subcommand, each a page that parses, builds the config, calls one function."""
