from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/report.smk"


wildcard_constraints:
    run="[^/]+",


rule all:
    default_target: True
    input:
        wanted(),
    localrule: True


onstart:
    heed_signals()
    limit_no_rate()
    check_forced()
    check_judges()
    begin()


onsuccess:
    end()
    conclude()


onerror:
    end()
    name_failures()
