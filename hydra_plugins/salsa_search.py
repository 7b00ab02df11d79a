"""Hydra's sweeper for `hydra/sweeper=optuna`: Optuna's, in a search that can be killed and goes on from its storage.

Hydra finds plugins in this package alone, and imports them all for any application: neither the project nor Optuna is
imported at the top.
"""

from hydra.plugins.sweeper import Sweeper


class SalsaSearch(Sweeper):
    """Takes the settings of Optuna's sweeper, and hands all to `salsa.workflow.search.Search`."""

    def __init__(self, **settings):
        from salsa.workflow import search

        self.search = search.Search(**settings)

    def setup(self, *, hydra_context, task_function, config):
        self.search.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments):
        self.search.sweep(arguments)
