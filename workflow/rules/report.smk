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
        mem_mb=memory("study"),
        runtime=60,
    shell:
        command("study", python="python")


# Both lie in the folder of studies; only the comparison's rule has a name of its own.
ruleorder: comparison > study


rule comparison:
    input:
        parents("comparison"),
    output:
        manifest=beside("comparison", "manifest.json"),
        figures=report(
            directory(beside("comparison", "figures")),
            patterns=["{figure}.png"],
            caption="../report/figures.rst",
            category="Figures",
            subcategory="{run}",
            labels={"figure": "{figure}"},
        ),
        tables=report(
            directory(beside("comparison", "tables")),
            patterns=["{table}.csv"],
            caption="../report/tables.rst",
            category="Tables",
            subcategory="{run}",
            labels={"table": "{table}"},
        ),
        text=report(
            beside("comparison", "comparison.md"),
            caption="../report/comparison.rst",
            category="Comparison",
            subcategory="{run}",
        ),
    log:
        beside("comparison", "log.txt"),
    benchmark:
        beside("comparison", "benchmark.tsv")
    wildcard_constraints:
        run=comparison_name(),
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("comparison"),
        runtime=60,
    shell:
        command("comparison", python="python")
