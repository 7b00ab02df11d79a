rule study:
    input:
        parents("study"),
    output:
        manifest=beside("study", "manifest.json"),
        figures=report(
            directory(beside("study", "figures")),
            patterns=["{figure}.png"],
            caption="../report/figures.rst",
            category="Figures",
            subcategory="{run}",
            labels={"figure": "{figure}"},
        ),
        tables=report(
            directory(beside("study", "tables")),
            patterns=["{table}.csv"],
            caption="../report/tables.rst",
            category="Tables",
            subcategory="{run}",
            labels={"table": "{table}"},
        ),
        claims=report(
            beside("study", "claims.md"),
            caption="../report/claims.rst",
            category="Claims",
            subcategory="{run}",
        ),
    log:
        beside("study", "log.txt"),
    benchmark:
        beside("study", "benchmark.tsv")
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    shell:
        command("study", python="python")
