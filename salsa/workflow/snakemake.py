"""Snakemake as `salsa run` starts it: Ctrl-C while it is imported is one line, too (`failures.hook`)."""

if __name__ == "__main__":
    from snakemake.cli import main

    main()
