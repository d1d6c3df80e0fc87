"""A scene on disk, how one is made, and what is cut out of it."""
