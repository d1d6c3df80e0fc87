"""``python -m fastdiffclip``: the command line."""

from fastdiffclip.cli import main

if __name__ == "__main__":
    main()
