"""Hydra's launcher `salsa`: all points of a batch become one Snakemake DAG, which computes what they share once.

It hands the batch to the application (`salsa.workflow.multirun.Application`), and then gives each point its folder
below `hydra.sweep.dir`, as Hydra's basic launcher does. Hydra finds plugins in this package alone, and imports them all
for any application: nothing of the project is imported at the top.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict

log = logging.getLogger(__name__)


@dataclass
class SalsaLauncherConf:
    _target_: str = "hydra_plugins.salsa_launcher.SalsaLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="salsa", node=SalsaLauncherConf, provider="salsa")


class SalsaLauncher(Launcher):
    """One Snakemake a batch; then one job a point, whose return value is its study's objective."""

    def setup(self, *, hydra_context, task_function, config):
        self.hydra_context = hydra_context
        self.application = task_function
        self.config = config

    def launch(self, job_overrides, initial_job_idx):
        """The `JobReturn` of each point, in order; that of a point that failed raises what went wrong."""
        from salsa.workflow import multirun

        setup_globals()
        sweep = self.config.hydra.sweep
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        points = [list(filter_overrides(overrides)) for overrides in job_overrides]
        configs = [self._config(number, overrides) for number, overrides in enumerate(job_overrides, initial_job_idx)]
        file = Path(str(sweep.dir)) / f"points-{initial_job_idx}.json"
        searching = multirun.searches(self.config.hydra)
        if searching:
            for number, point in enumerate(points, initial_job_idx):
                chosen = [text for text in point if text not in self.application.given]
                print(f"trial {number} starts: {' '.join(chosen)} (log: {multirun.log_beside(file)})", flush=True)
        else:
            log.info(f"One DAG of {len(points)} points, in {sweep.dir}")
            for number, point in enumerate(points, initial_job_idx):
                log.info(f"\t#{number} : {' '.join(point)}")
        outcomes = self.application.compute(points, file, searching)
        return [self._job(config, outcome) for config, outcome in zip(configs, outcomes, strict=True)]

    def _config(self, number, overrides):
        """A point's configuration, with Hydra's own."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _job(self, config, outcome):
        """Give a point its folder (.hydra/, the log, the objective), as Hydra does with any job."""
        from salsa.workflow import multirun

        result = run_job(
            task_function=lambda _: multirun.report(outcome),
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.hydra_context,
        )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return result
