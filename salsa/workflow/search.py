"""A search for the best point with Optuna, as Hydra's own sweeper runs it, which can be killed and goes on.

What a trial tries depends on the search's seed, on the trial's number and on the trials before it, because each has a
sampler of its own. So a search that goes on from its storage (`hydra.sweeper.storage`, `hydra.sweeper.study_name`)
tries what it would have tried without a break: trials that were running are run again at the same point, and those that
ended count among `hydra.sweeper.n_trials`. Left out: several objectives at once, of which a study has one.
"""

import contextlib
import functools
import logging
import math
import random
from pathlib import Path

import optuna
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import OmegaConf
from optuna.trial import TrialState

from salsa.workflow import multirun, objectives, runs
from salsa.workflow.messages import UserError

log = logging.getLogger(__name__)

ENDED = (TrialState.COMPLETE, TrialState.FAIL)


class Search(OptunaSweeperImpl):
    """One search. Its constructor takes what stands under `hydra.sweeper`."""

    def setup(self, *, hydra_context, task_function, config):
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.application = task_function

    def sweep(self, arguments):
        """Run trials, `n_jobs` of them at once, until there are `n_trials`.

        Args:
            arguments: overrides; those that are sweeps say what is searched.

        Raises:
            multirun.Refused: what is wrong with the search, or too many of its points.
        """
        try:
            space, fixed = self._space(arguments)
            self.study = self._open(space, fixed)
            while batch := self._next_batch(space, fixed):
                trials, points = zip(*batch, strict=True)
                returns = self.launcher.launch(points, initial_job_idx=trials[0].number)
                failures = [self._tell(trial, job, space) for trial, job in zip(trials, returns, strict=True)]
                if sum(failure is not None for failure in failures) > self.max_failure_rate * len(failures):
                    raise next(failure for failure in failures if failure is not None)
            self._conclude()
        except UserError as error:
            raise multirun.Refused(f"salsa: {error}") from None

    def _space(self, arguments):
        """Name -> distribution of what is searched, and name -> value of what is not."""
        self._process_searchspace_config()
        given, fixed = create_params_from_overrides([*self._parse_sweeper_params_config(), *arguments])
        space = (self.search_space_distributions or {}) | given
        space = {name: distribution for name, distribution in space.items() if name not in fixed}
        if isinstance(self.sampler, functools.partial):  # the sampler of a grid, which ends with it
            grid = {name: self._to_grid_sampler_choices(distribution) for name, distribution in space.items()}
            self.sampler = self.sampler(grid)
            self.n_trials = min(self.n_trials, math.prod(map(len, grid.values())))
        return space, fixed

    def _open(self, space, fixed):
        """The Optuna study, with the trials that its storage has. UserError where they are those of another search."""
        directions = self._get_directions()
        if len(directions) > 1:
            raise UserError("hydra.sweeper.direction: a study has one objective; give maximize or minimize")
        if self.storage is not None and not self.study_name:
            raise UserError(
                "hydra.sweeper.storage: without a name, its trials are not found again; give hydra.sweeper.study_name"
            )
        with _one_line(f"hydra.sweeper.storage={self.storage}"):
            study = optuna.create_study(
                study_name=self.study_name, storage=_storage(self.storage), directions=directions, load_if_exists=True
            )
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            _check_same(self.study_name, trial, space, fixed)
        ended = [trial for trial in trials if trial.state in ENDED]
        if trials:
            left = max(0, self.n_trials - len(ended))
            log.info(f"{self.study_name}: {len(ended)} trials have ended, {left} are left of {self.n_trials}")
        file = Path(self.sweep_dir).absolute() / "points.json"
        self.application.batches += [  # which are compared with the new ones at the end
            (file, [_overrides(trial, space, fixed)]) for trial in ended if trial.state == TrialState.COMPLETE
        ]
        return study

    def _next_batch(self, space, fixed):
        """(trial, its overrides) of each trial to run now: those that a killed process left, then new ones."""
        trials = self.study.get_trials(deepcopy=False)
        ended = sum(trial.state in ENDED for trial in trials)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING][: self.n_jobs]
        batch = []
        for trial in running:
            self.study.sampler = optuna.samplers.RandomSampler()  # which changes nothing of what was chosen before
            batch.append(self._point(optuna.trial.Trial(self.study, trial._trial_id), space, fixed))
        # Where some of a batch have ended, no other belongs to it.
        complete = running and ended % self.n_jobs
        for _ in range(0 if complete else min(self.n_trials - ended, self.n_jobs) - len(running)):
            self.study.sampler = self._sampler(ended + len(batch))
            batch.append(self._point(self.study.ask(), space, fixed))
        return batch

    def _point(self, trial, space, fixed):
        with _one_line(f"hydra.sweeper.storage={self.storage}"):
            self._configure_trials([trial], space, fixed)
        return trial, _overrides(trial, space, fixed)

    def _sampler(self, number):
        """The sampler of the trial of this number."""
        settings = self.config.hydra.sweeper.sampler
        seed = settings.get("seed")
        if isinstance(self.sampler, optuna.samplers.GridSampler):
            random.seed(number)  # it draws from here the order of the grid
            return self.sampler
        if seed is None:
            return self.sampler
        return instantiate(settings, seed=runs.derive_seed(seed, "trial", number))

    def _tell(self, trial, job, space):
        """Note and print what a trial has come to; returns the failure, or None."""
        failure, value = None, None
        try:
            value = float(job.return_value)
        except Exception as error:  # whatever the job raised, and nothing where a study has no objective
            failure = error
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        with contextlib.suppress(RuntimeError):  # which a grid raises with its last point: nobody called `optimize`
            self.study.tell(trial, value, state)
        best = self.study.best_trial if any(t.state == TrialState.COMPLETE for t in self.study.trials) else None
        print(objectives.trial_line(trial.number, _overrides(trial, space), value, best, failure), flush=True)
        return failure

    def _conclude(self):
        """Write the best trial to optimization_results.yaml."""
        if not any(trial.state == TrialState.COMPLETE for trial in self.study.trials):
            raise UserError("no trial has an objective; see what was said of each")
        best = self.study.best_trial
        results = {
            "name": "optuna",
            "best_trial": best.number,
            "best_params": dict(sorted(best.params.items())),
            "best_value": best.value,
        }
        runs.write_atomically(Path(self.sweep_dir) / "optimization_results.yaml", OmegaConf.to_yaml(results))


def _storage(storage):
    """What Optuna keeps trials in; None: this process's memory."""
    if not isinstance(storage, str):
        return storage
    # Optuna 2 was written for SQLAlchemy 1, which ended transactions that nobody did; its successor rolls them back.
    return optuna.storages.RDBStorage(storage, engine_kwargs={"isolation_level": "AUTOCOMMIT"})


@contextlib.contextmanager
def _one_line(place):
    """A context in which an error of a storage is a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of SQLAlchemy, of a driver, of Optuna: many classes
        raise UserError(f"{place}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}") from None


def _check_same(name, trial, space, fixed):
    """UserError where a trial of the storage is one of another search than this."""
    tried = {key: str(distribution) for key, distribution in trial.distributions.items()}
    wanted = {key: str(distribution) for key, distribution in space.items()}
    for before, now in ((trial.user_attrs, fixed), (tried, wanted)):
        # Of a trial that was killed while its point was chosen, a part is there.
        for key in sorted(before if trial.state == TrialState.RUNNING else {*before, *now}):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"hydra.sweeper.study_name={name}: holds trials with {key}={before.get(key, 'left out')}, not "
                    f"{now.get(key, 'left out')}; give the same overrides, or another study_name"
                )


def _overrides(trial, space, fixed=None):
    """A trial's overrides, in the order of the command line: a storage keeps no order."""
    params = trial.params
    ordered = {name: params[name] for name in space if name in params} | params | (fixed or {})
    return [f"{name}={value}" for name, value in ordered.items()]
