"""The model card of a pipeline: what it is and how to use it, and no number that was not measured."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distilled_decoding.index import PipelineConfig
    from distilled_decoding.pipeline import Pipeline

_LISTED_CLASSES = 20


def model_card(pipeline: "Pipeline", name: str) -> str:
    """A model card in Markdown with the YAML head that the Hugging Face hub reads.

    Args:
        pipeline: the model.
        name: what `from_pretrained` is to call it: a hub id or a folder.
    """
    config, order, flow = pipeline.config, pipeline.teacher.order, pipeline.config.flow
    codes, channels = pipeline.teacher.codebook.shape
    what = "teacher and its distilled student" if pipeline.student is not None else "teacher, not distilled yet"
    reads = "class" if pipeline.num_classes else "text"
    task = "text-to-image" if reads == "text" else "unconditional-image-generation"
    return f"""---
library_name: distilled-decoding
pipeline_tag: {task}
tags: {json.dumps([config.family, f"{reads}-conditional", "autoregressive", "distillation"])}
---

# {name}

A {reads}-conditional autoregressive image model of the family `{config.family}`: a {what}.

| | |
|---|---|
| classes | {len(config.class_names)}{_classes(config.class_names)} |
| tokens of an image | {order.length} |
| blocks, each a forward pass of the teacher | {order.num_blocks} |
| codebook | {codes} codes of {channels} channels |

## Teacher

It samples with these settings. A student learns them with it, by the {flow.solver} flow in {flow.num_steps} steps.

| setting | value |
|---|---|
{_settings(config)}

## Student

{_student(config) if pipeline.student is not None else _NO_STUDENT[reads]}

## Use

{_use_of_text(name) if reads == "text" else _use(pipeline, name)}

## Measured

Nothing yet. Only what `distilled-decoding evaluate` prints belongs here, with its samples, seeds and machine.
"""


_NO_STUDENT = {
    "class": "None yet: `distilled-decoding distill` makes one.",
    "text": "None: students are of classes.",
}


def _use(pipeline: "Pipeline", name: str) -> str:
    labels = [0, pipeline.num_classes - 1]
    steps = "1" if pipeline.student is not None else "teacher"
    return f"""```python
from distilled_decoding import Pipeline

pipe = Pipeline.from_pretrained("{name}")
images = pipe(labels={labels}, seeds=[0, 1], steps={steps if steps == "1" else f'"{steps}"'}).images
```

```
distilled-decoding sample {name} --labels {labels[0]} {labels[1]} --num 8 --steps {steps} --out samples
```"""


def _use_of_text(name: str) -> str:
    return f"""```python
from distilled_decoding import Pipeline

teacher = Pipeline.from_pretrained("{name}").teacher
```

The teacher reads `distilled_decoding.condition.Captions`, the features that its text encoder gives."""


def _classes(names: tuple[str, ...]) -> str:
    if not names:
        return ", it reads captions"
    return ": " + (", ".join(names) if len(names) <= _LISTED_CLASSES else f"{names[0]} to {names[-1]}")


def _settings(config: "PipelineConfig") -> str:
    return "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in asdict(config.sampling).items())


def _student(config: "PipelineConfig") -> str:
    starts = ", ".join(map(str, config.start_blocks))
    return f"""| | |
|---|---|
| starting blocks, so up to {len(config.start_blocks)} steps | {starts} |
| split | blocks before {config.split_block} come from the logits head, the others from the code head |"""
