"""Kinds of a thing that are found because their files lie in its package: a new kind is a new file, and no list."""

import importlib
import importlib.util
import pkgutil


def names(package):
    """The names of a package's modules, in their order; nothing of them is imported. A package in it is no kind."""
    places = importlib.util.find_spec(package).submodule_search_locations
    return [module.name for module in pkgutil.iter_modules(places) if not module.ispkg]


def records(package, name):
    """The records that the modules of a package call `name`, by their `kind`, in the order of the file names.

    Args:
        package: the name of a package. All of its modules are imported, so none may import torch at its top.
        name: of a module's record, such as "WORLD"; a module without one is no kind.

    Raises RuntimeError where two modules name one kind.
    """
    found = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        record = getattr(importlib.import_module(f"{package}.{module.name}"), name, None)
        if record is None:
            continue
        if record.kind in found:
            raise RuntimeError(f"{package}.{module.name}: another file has the kind {record.kind}, too")
        found[record.kind] = record
    return found
