from superblock.cli.main import run

raise SystemExit(run("benchmark"))
