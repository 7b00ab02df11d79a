"""Kinds of a thing that are found because their files lie in its package: a new kind is a new file, and no list."""

import importlib
import importlib.util
import pkgutil

from salsa.workflow.messages import UserError


def names(package):
    """The names of a package's modules, in their order; nothing of them is imported. A package in it is no kind."""
    places = importlib.util.find_spec(package).submodule_search_locations
    return [module.name for module in pkgutil.iter_modules(places) if not module.ispkg]


def records(package, name):
    """The records that the modules of a package call `name`, by their `kind`, in the order of the file names.

    Args:
        package: the name of a package. All of its modules are imported, so none may import torch at its top.
        name: of a module's record, such as "WORLD"; a module without one is no kind.

    Raises UserError where a file has a fault (its record lacks a field, say), and where a record's kind isn't the name
    of its file, by which a reader would look for it.
    """
    kinds = {}
    for module in names(package):
        file = f"{package.replace('.', '/')}/{module}.py"
        try:
            record = getattr(importlib.import_module(f"{package}.{module}"), name, None)
        except Exception as error:
            raise UserError(f"{file}: {error}") from error
        if record is not None and record.kind != module:
            raise UserError(f"{file}: its {name} is of the kind {record.kind!r}; name the file so")
        if record is not None:
            kinds[module] = record
    return kinds
