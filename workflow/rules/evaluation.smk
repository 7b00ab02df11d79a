rule landscape:
    input:
        parents("landscape"),
    output:
        update(beside("landscape", "manifest.json")),
    log:
        beside("landscape", "log.txt"),
    benchmark:
        beside("landscape", "benchmark.tsv")
    conda:
        "../../environment.yml"
    threads: execution("landscape", "threads")
    resources:
        mem_mb=memory("landscape"),
        runtime=execution("landscape", "runtime"),
        gpu=execution("landscape", "gpus"),
    params:
        launcher=launcher("landscape"),
    shell:
        command("landscape", show=True)


rule respond:
    input:
        parents("respond"),
    output:
        update(beside("respond", "manifest.json")),
    log:
        beside("respond", "log.txt"),
    benchmark:
        beside("respond", "benchmark.tsv")
    conda:
        "../../environment.yml"
    threads: execution("respond", "threads")
    resources:
        mem_mb=memory("respond"),
        runtime=execution("respond", "runtime"),
        gpu=execution("respond", "gpus"),
    params:
        launcher=launcher("respond"),
    shell:
        command("respond")


rule plane:
    input:
        parents("plane"),
    output:
        update(beside("plane", "manifest.json")),
    log:
        beside("plane", "log.txt"),
    benchmark:
        beside("plane", "benchmark.tsv")
    conda:
        "../../environment.yml"
    threads: execution("plane", "threads")
    resources:
        mem_mb=memory("plane"),
        runtime=execution("plane", "runtime"),
        gpu=execution("plane", "gpus"),
    params:
        launcher=launcher("plane"),
    shell:
        command("plane")


rule judge:
    input:
        parents("judge"),
    output:
        update(beside("judge", "manifest.json")),
    log:
        beside("judge", "log.txt"),
    benchmark:
        beside("judge", "benchmark.tsv")
    group:
        verdicts
    conda:
        "../../environment.yml"
    threads: execution("judge", "threads")
    resources:
        mem_mb=memory("judge"),
        runtime=execution("judge", "runtime"),
        gpu=execution("judge", "gpus"),
    params:
        launcher=launcher("judge"),
    shell:
        command("judge")
