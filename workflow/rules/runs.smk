# One rule a stage: what sets stages apart is in their records (salsa/workflow/stages.py).
for stage in (stage for stage in STAGES if not stage.page):

    rule:
        name:
            stage.name
        input:
            parents(stage),
        output:
            update(beside(stage, "manifest.json")),
        log:
            beside(stage, "log.txt"),
        benchmark:
            beside(stage, "benchmark.tsv")
        retries: RETRIES if stage.retried else None
        group:
            group(stage)
        conda:
            "../../environment.yml"
        threads: resource(stage, "threads")
        resources:
            mem_mb=memory(stage),
            runtime=resource(stage, "runtime"),
            gpu=resource(stage, "gpus"),
        params:
            command=command(stage),
        shell:
            "{params.command}"
