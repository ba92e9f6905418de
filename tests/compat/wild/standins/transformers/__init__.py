"""Stands in for transformers: ``pipeline()``, which answers with what it was asked."""


class _Pipeline:
    def __init__(self, task, model):
        self.task, self.model = task, model

    def __call__(self, inputs, **options):
        if self.task == "text-classification":
            if isinstance(inputs, dict):
                inputs = inputs["text"]
            if not isinstance(inputs, str):
                raise TypeError(f"not a text: {inputs!r}")
            return [{"label": "POSITIVE", "score": len(inputs) / 10, **options}]
        last = inputs[-1]["content"]
        return [{"generated_text": [*inputs, {"role": "assistant", "content": last[::-1]}]}]


def pipeline(task, model=None, device=None, **_):
    return _Pipeline(task, model)
