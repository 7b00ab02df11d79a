rule corpus:
    input:
        parents("corpus"),
    output:
        update(beside("corpus", "manifest.json")),
    log:
        beside("corpus", "log.txt"),
    benchmark:
        beside("corpus", "benchmark.tsv")
    group:
        "data"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("corpus"),
        runtime=60,
    shell:
        command("corpus", python="python")


rule prepare:
    input:
        parents("prepare"),
    output:
        update(beside("prepare", "manifest.json")),
    log:
        beside("prepare", "log.txt"),
    benchmark:
        beside("prepare", "benchmark.tsv")
    group:
        "data"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("prepare"),
        runtime=60,
    shell:
        command("prepare", python="python")


rule benchmark:
    input:
        parents("benchmark"),
    output:
        update(beside("benchmark", "manifest.json")),
    log:
        beside("benchmark", "log.txt"),
    benchmark:
        beside("benchmark", "benchmark.tsv")
    group:
        "data"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=memory("benchmark"),
        runtime=60,
    shell:
        command("benchmark", python="python")
