# The stages that make a report: Snakemake's own report shows what is in it.
def report_files(stage):
    return {
        "manifest": beside(stage, "manifest.json"),
        "figures": report(
            directory(beside(stage, "figures")),
            patterns=["{figure}.png"],
            caption="../report/figures.rst",
            category="Figures",
            subcategory="{run}",
            labels={"figure": "{figure}"},
        ),
        "tables": report(
            directory(beside(stage, "tables")),
            patterns=["{table}.csv"],
            caption="../report/tables.rst",
            category="Tables",
            subcategory="{run}",
            labels={"table": "{table}"},
        ),
        "page": report(
            beside(stage, stage.page),
            caption=f"../report/{Path(stage.page).stem}.rst",
            category=Path(stage.page).stem.title(),
            subcategory="{run}",
        ),
    }


REPORTS = [stage for stage in STAGES if stage.page]
LOOKING = [stages.STUDY] if HAS_LOOKS else []


# A look of a study says whether more is to be run: Snakemake then asks for the DAG again.
for stage in LOOKING:

    checkpoint:
        name:
            stage.name
        input:
            parents(stage),
        output:
            **report_files(stage),
        log:
            beside(stage, "log.txt"),
        benchmark:
            beside(stage, "benchmark.tsv")
        wildcard_constraints:
            run=run_names(stage),
        conda:
            "../../environment.yml"
        threads: resource(stage, "threads")
        resources:
            mem_mb=memory(stage),
            runtime=resource(stage, "runtime"),
        params:
            command=command(stage),
        shell:
            "{params.command}"


for stage in (stage for stage in REPORTS if stage not in LOOKING):

    rule:
        name:
            stage.name
        input:
            parents(stage),
        output:
            **report_files(stage),
        log:
            beside(stage, "log.txt"),
        benchmark:
            beside(stage, "benchmark.tsv")
        wildcard_constraints:
            run=run_names(stage),
        conda:
            "../../environment.yml"
        threads: resource(stage, "threads")
        resources:
            mem_mb=memory(stage),
            runtime=resource(stage, "runtime"),
        params:
            command=command(stage),
        shell:
            "{params.command}"


# Both lie in the folder of studies; only the comparison's rule has a name of its own.
ruleorder: comparison > study
