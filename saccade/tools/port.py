"""Ports: anybody's model put to a golden, with a map from the authors' names to its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.core.keymap import Dropped, KeyMap, Rule, rename
from saccade.golden import Golden, by_name, cotangent, make_inputs, make_state, mismatch
from saccade.parts.reparameterize import reparameterize
from saccade.tools.verify import DEPLOYED, Verdict, like, run_tapped

State = dict[str, Tensor]


def only_input(inputs: State) -> tuple[Tensor, ...]:
    """The golden's inputs as they are, in their order."""
    return tuple(inputs.values())


def same(state: State) -> State:
    """The authors' names are the port's."""
    return state


@dataclass
class Port:
    """A module that answers a golden.

    `rename` turns the authors' state into the module's (differentiably), `inputs` the golden's inputs into the module's
    arguments, `outputs` what the module returns into the golden's outputs by name (by default: a dict as it is, others
    in the golden's order). `taps` names inner modules whose outputs the golden holds too; `unused` counts the
    parameters that the authors' code makes and never calls.
    """

    module: nn.Module
    rename: Callable[[State], State] = same
    inputs: Callable[[State], tuple[Any, ...]] = only_input
    outputs: Callable[[Any], State] | None = None
    taps: dict[str, str] | None = None
    unused: int = 0


def key_map(rules: KeyMap) -> Callable[[State], State]:
    """A port's `rename` from a paper's key map."""
    return lambda state: rename(state, rules).state


def unused(golden: Golden, rules: KeyMap) -> int:
    """How many of a golden's parameters (not buffers) a key map drops."""
    parameters = {name for name, _, kind in golden["state"] if kind == "param"}
    state = make_state(golden)
    return sum(state[name].numel() for name in rename(state, rules).dropped if name in parameters)


def errors(port: Port, golden: Golden) -> dict[str, float]:
    """The error of every output and gradient of a golden, in standard deviations of the authors' value.

    Raises SaccadeError where a name of the golden or of the module is not accounted for.
    """
    state, inputs = make_state(golden), make_inputs(golden)
    dtype = next((value.dtype for value in inputs.values() if value.is_floating_point()), torch.float32)
    module = port.module.to(dtype).eval()
    shared = {id(value): value.to(dtype) for value in state.values()}  # entries that are one tensor stay one
    leaves = {name: shared[id(value)] for name, value in state.items()}
    for name in golden["grads"].keys() & leaves.keys():
        leaves[name].requires_grad_()
    points = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
    ours = port.rename(leaves)
    _account(golden["model"], module, ours)
    arguments = port.inputs(points)
    result = torch.func.functional_call(module, ours, arguments)
    got = port.outputs(result) if port.outputs else by_name(result, list(golden["outputs"]))
    if port.taps:
        module.load_state_dict({name: value.detach() for name, value in ours.items()}, strict=False)
        wanted = {name: tap for name, tap in port.taps.items() if name in golden["outputs"]}
        tapped = run_tapped(module, arguments[0].detach(), wanted)
        got |= {name: like(value, golden["outputs"][name]) for name, value in tapped.items() if name in wanted}
    for what in DEPLOYED & golden["outputs"].keys() - got.keys():
        module.load_state_dict({name: value.detach() for name, value in ours.items()}, strict=False)
        deployed = reparameterize(module)(*arguments)
        got[what] = port.outputs(deployed)["out"] if port.outputs else deployed
    _all_given(golden, got)
    found = {name: mismatch(wanted, got[name]) for name, wanted in golden["outputs"].items()}
    if golden["grads"]:
        first = got[next(iter(golden["outputs"]))]
        (first * cotangent(first.shape).to(first.dtype)).sum().backward()
        for name, wanted in golden["grads"].items():
            gradient = (points | leaves)[name].grad
            found[f"d/d {name}"] = math.inf if gradient is None else mismatch(wanted, gradient)
    return found


def _account(golden: str, module: nn.Module, given: State) -> None:
    """Every name both ways, with its shape; buffers that the module makes itself need not be given."""
    wanted = module.state_dict()
    must = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    must |= {name for name in wanted if name.rpartition(".")[2] in ("running_mean", "running_var")}
    left, missing = sorted(set(given) - set(wanted)), sorted(must - set(given))
    wrong = [f"{name} is {tuple(value.shape)} in the golden and {tuple(wanted[name].shape)} in the port"
             for name, value in given.items() if name in wanted and value.shape != wanted[name].shape]
    problems = [
        *([f"{len(left)} names of the golden are not in the port ({_some(left)})"] if left else []),
        *([f"{len(missing)} of the port are not in the golden ({_some(missing)})"] if missing else []), *wrong[:3],
    ]
    if problems:
        raise SaccadeError(f"{golden}: {'; '.join(problems)}: the key map renames them, or drops them by null")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _all_given(golden: Golden, got: dict[str, Any]) -> None:
    missing = [name for name in golden["outputs"] if name not in got]
    if missing:
        raise SaccadeError(f"{golden['model']}: the port gives {', '.join(got)} and not {', '.join(missing)}: return a "
                           "dict, tap the modules that give them, or say what to compare, as in --only out")


def narrow(golden: Golden, only: Sequence[str]) -> Golden:
    """The golden with those of its outputs and gradients ("d/d NAME") that a pattern names; all where there is none.

    The first output stays beside gradients, which are its. Raises SaccadeError where nothing is left.
    """
    if not only:
        return golden
    grads = {name: value for name, value in golden["grads"].items() if _matches(f"d/d {name}", only)}
    outputs = {name: value for place, (name, value) in enumerate(golden["outputs"].items())
               if _matches(name, only) or (grads and place == 0)}
    if not outputs:
        known = [*golden["outputs"], *(f"d/d {name}" for name in golden["grads"])]
        raise SaccadeError(f"--only {','.join(only)}: {golden['model']} holds {', '.join(known)}")
    return golden | {"outputs": outputs, "grads": grads}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def verify_port(build: Callable[[Golden], Any], golden: Golden, rules: KeyMap | None = None) -> list[Verdict]:
    """Compare what `build(golden)` gives with the golden: a Port, a module, or a function of arrays.

    A module takes the golden's inputs in their order. A function takes (state, inputs), dicts of NumPy arrays by name,
    and returns an array, a list of them in the golden's order, or a dict by output; it has no gradients to compare.
    """
    name = golden["model"]
    port = _attempt(f"{name}: the port could not be built", build, golden)
    if isinstance(port, nn.Module):
        port = Port(port)
    if isinstance(port, Port):
        if rules is not None:
            dropped = _attempt(f"{name}: the key map fails", unused, golden, rules)
            port = replace(port, rename=key_map(rules), unused=dropped)
        found = _attempt(f"{name}: the port failed on the golden's inputs", errors, port, golden)
        count = sum(value.numel() for value in port.module.parameters() if value.requires_grad) + port.unused
        verdicts = [] if golden["params"] is None else [
            Verdict(name, "parameters", abs(count - golden["params"]), 0)]
    elif callable(port):
        state = {key: value.numpy() for key, value in rename(make_state(golden), rules or ()).state.items()}
        inputs = {key: value.numpy() for key, value in make_inputs(golden).items()}
        result = _attempt(f"{name}: the port failed on the golden's inputs", port, state, inputs)
        got = by_name(result, list(golden["outputs"]))
        _all_given(golden, got)
        found = {key: mismatch(wanted, torch.as_tensor(got[key])) for key, wanted in golden["outputs"].items()}
        verdicts = []
    else:
        raise SaccadeError(f"{name}: the port is a {type(port).__name__}, neither a module nor a function nor a Port")
    return verdicts + [Verdict(name, what, error, golden["tolerance"]) for what, error in found.items()]


def _attempt(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except SaccadeError:
        raise
    except Exception as error:  # it is not our code: whatever it raises is told in one line
        raise SaccadeError(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} "
                           "(--debug shows where)") from error


def load_build(where: str) -> Callable[[Golden], Any]:
    """The function that `module:function` or `file.py:function` names; the working folder is searched too."""
    source, _, name = where.rpartition(":")
    if not source or not name.isidentifier():
        raise SaccadeError(f"--port {where}: give module:function or file.py:function")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise SaccadeError(f"--port {where}: there is no file {source}")
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert spec is not None and spec.loader is not None  # the name ends in .py
        module = importlib.util.module_from_spec(spec)
        _attempt(f"--port {where}: {source} could not be run", spec.loader.exec_module, module)
    else:
        module = _attempt(f"--port {where}: {source} could not be imported", importlib.import_module, source)
    if not callable(getattr(module, name, None)):
        raise SaccadeError(f"--port {where}: {source} has no function {name}")
    return getattr(module, name)


def read_keymap(path: Path) -> list[Rule]:
    """A key map from JSON: pairs [pattern, name] in order, or an object {their name: ours}; null drops a name.

    As in `core.keymap`, a pattern is a regular expression for the whole name, `\\1` stands for its groups, `name#i` for
    the i-th piece of a joined tensor, and a list of names for the pieces of one that is split.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaccadeError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise SaccadeError(f"{path}: not JSON ({error})") from error
    exact = isinstance(given, dict)
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, list):
        raise SaccadeError(f"{path}: give a list of [pattern, name] or an object of names")
    rules: list[Rule] = []
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) and _target(pair[1])):
            raise SaccadeError(f"{path}: {json.dumps(pair)} is no pair of a pattern and a name, names or null")
        theirs, ours = pair
        try:
            re.compile(theirs)
        except re.error as error:
            raise SaccadeError(f"{path}: {theirs!r} is no regular expression ({error})") from error
        if exact:
            theirs = re.escape(theirs)
        if ours is None:
            rules.append(Dropped(theirs, "dropped by the key map"))
        else:
            rules.append((theirs, ours if isinstance(ours, str) else tuple(ours)))
    return rules


def _target(name: Any) -> bool:
    names = name if isinstance(name, list) and name else [name]
    return name is None or all(isinstance(each, str) for each in names)
