"""``python -m superblock`` is the console command."""

from superblock.cli.main import entry

if __name__ == "__main__":
    entry()
