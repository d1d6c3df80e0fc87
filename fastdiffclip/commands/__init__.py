"""What the commands do and show; ``cli.py`` holds their options."""
