"""Things to try the library out with."""
