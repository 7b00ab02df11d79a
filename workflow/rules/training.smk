rule base:
    input:
        parents("base"),
    output:
        update(beside("base", "manifest.json")),
    log:
        beside("base", "log.txt"),
    benchmark:
        beside("base", "benchmark.tsv")
    retries: RETRIES
    conda:
        "../../environment.yml"
    threads: execution("base", "threads")
    resources:
        mem_mb=memory("base"),
        runtime=execution("base", "runtime"),
        gpu=execution("base", "gpus"),
    params:
        launcher=launcher("base"),
    shell:
        command("base")


rule sft:
    input:
        parents("sft"),
    output:
        update(beside("sft", "manifest.json")),
    log:
        beside("sft", "log.txt"),
    benchmark:
        beside("sft", "benchmark.tsv")
    retries: RETRIES
    conda:
        "../../environment.yml"
    threads: execution("sft", "threads")
    resources:
        mem_mb=memory("sft"),
        runtime=execution("sft", "runtime"),
        gpu=execution("sft", "gpus"),
    params:
        launcher=launcher("sft"),
    shell:
        command("sft")


rule reward_model:
    input:
        parents("reward_model"),
    output:
        update(beside("reward_model", "manifest.json")),
    log:
        beside("reward_model", "log.txt"),
    benchmark:
        beside("reward_model", "benchmark.tsv")
    retries: RETRIES
    conda:
        "../../environment.yml"
    threads: execution("reward_model", "threads")
    resources:
        mem_mb=memory("reward_model"),
        runtime=execution("reward_model", "runtime"),
        gpu=execution("reward_model", "gpus"),
    params:
        launcher=launcher("reward_model"),
    shell:
        command("reward_model")


rule ppo:
    input:
        parents("ppo"),
    output:
        update(beside("ppo", "manifest.json")),
    log:
        beside("ppo", "log.txt"),
    benchmark:
        beside("ppo", "benchmark.tsv")
    retries: RETRIES
    conda:
        "../../environment.yml"
    threads: execution("ppo", "threads")
    resources:
        mem_mb=memory("ppo"),
        runtime=execution("ppo", "runtime"),
        gpu=execution("ppo", "gpus"),
    params:
        launcher=launcher("ppo"),
    shell:
        command("ppo")
