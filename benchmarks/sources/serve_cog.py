"""The chosen handler as a Cog runner: ``python -m cog.server.http``.

Cog takes the fields of the input as parameters of ``run``, and reads them off its signature.
A quick handler runs on the worker's event loop, several predictions at once; any other one is a
plain function, of which Cog runs one at a time and refuses (409) what comes meanwhile.
"""

import inspect

import handlers
from cog import BaseModel, BaseRunner

chosen = handlers.chosen()


Output = type(
    "Output",
    (BaseModel,),
    {"__annotations__": {n: f.annotation for n, f in chosen.Output.model_fields.items()}},
)


def _with_fields_of_input(run):
    fields = {name: field.annotation for name, field in chosen.Input.model_fields.items()}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    parameters += [inspect.Parameter(n, kind, annotation=f) for n, f in fields.items()]
    run.__signature__ = inspect.Signature(parameters, return_annotation=Output)
    run.__annotations__ = {**fields, "return": Output}
    return run


if chosen.QUICK:

    class Runner(BaseRunner):
        async def setup(self) -> None:
            handlers.prepare_and_load()

        @_with_fields_of_input
        async def run(self, **fields):
            return Output(**chosen.handle(chosen.Input(**fields)).model_dump())

else:

    class Runner(BaseRunner):
        def setup(self) -> None:
            handlers.prepare_and_load()

        @_with_fields_of_input
        def run(self, **fields):
            return Output(**chosen.handle(chosen.Input(**fields)).model_dump())
