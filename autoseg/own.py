"""Parts of one's own, named as `package.module:name` in a plan or a recipe.

Naming a module imports it: a plan or recipe that does so is as trustworthy as the code beside it.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from autoseg.records import AutosegError


def own(name: str, what: str) -> Callable[..., Any]:
    """What is called `package.module:name`; `what` it is for errors, such as "network".

    Raises AutosegError that says which part of the name is wrong.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise AutosegError(f"the {what} {name!r}: write package.module:name")
    try:
        module = import_module(module_name)
    except (ImportError, ValueError) as error:
        # A module that is not there says all in its name; one that is there and fails, where it does.
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        raise AutosegError(
            f"the {what} {name!r} cannot be imported ({error}); is its folder on PYTHONPATH, its package installed?"
        ) from (None if absent else error)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise AutosegError(f"the {what} {name!r}: the module {module_name!r} has no class or function {attribute!r}")
    made: Callable[..., Any] = found
    return made
