"""The commands: parse, call, print. Each module registers its own on the app."""
