"""learn2learn's recipes as short scripts: ``python -m fastmaml.examples.NAME``, see README.md."""
