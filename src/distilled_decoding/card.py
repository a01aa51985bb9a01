"""The model card of a pipeline: what it is and how to use it, and no number that was not measured."""

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distilled_decoding.index import PipelineConfig
    from distilled_decoding.pipeline import Pipeline

_LISTED_CLASSES = 20
_PROMPTS = ("a red apple", "a grinning face")


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
{_reads(pipeline)}
| tokens of an image | {order.length} |
| blocks, each a forward pass of the teacher | {order.num_blocks} |
| codebook | {codes} codes of {channels} channels |

## Teacher

It samples with these settings. A student learns them with it, by the {flow.solver} flow in {flow.num_steps} steps.

| setting | value |
|---|---|
{_settings(config)}

## Student

{_student(pipeline) if pipeline.student is not None else _NO_STUDENT}

## Use

{_use(pipeline, name)}

## Measured

Nothing yet. Only what `distilled-decoding evaluate` prints belongs here, with its samples, seeds and machine.
"""


_NO_STUDENT = "None yet: `distilled-decoding distill` makes one."


def _use(pipeline: "Pipeline", name: str) -> str:
    if pipeline.num_classes:
        asked, flag = f"labels=[0, {pipeline.num_classes - 1}]", f"--labels 0 {pipeline.num_classes - 1}"
    else:
        prompts = list((*pipeline.prompts, *_PROMPTS)[:2])
        asked, flag = f"prompts={json.dumps(prompts)}", f"--prompt {shlex.join(prompts)}"
    steps = "1" if pipeline.student is not None else "teacher"
    return f"""```python
from distilled_decoding import Pipeline

pipe = Pipeline.from_pretrained("{name}")
images = pipe({asked}, seeds=[0, 1], steps={steps if steps == "1" else f'"{steps}"'}).images
```

```
distilled-decoding sample {name} {flag} --num 8 --steps {steps} --out samples
```"""


def _reads(pipeline: "Pipeline") -> str:
    """A row of the table: the classes, or the captions and what makes them."""
    names = pipeline.config.class_names
    if names:
        return f"| classes | {len(names)}{_classes(names)} |"
    tokens, width = pipeline.teacher.caption_shape
    encoder = pipeline.config.text_encoder
    own = "the text encoder in its folder" if pipeline.text_source else "a text encoder that is not named"
    return f"| captions | {tokens} tokens of {width} channels, of {f'`{encoder}`' if encoder else own} |"


def _classes(names: tuple[str, ...]) -> str:
    return ": " + (", ".join(names) if len(names) <= _LISTED_CLASSES else f"{names[0]} to {names[-1]}")


def _settings(config: "PipelineConfig") -> str:
    return "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in asdict(config.sampling).items())


def _student(pipeline: "Pipeline") -> str:
    config = pipeline.config
    starts, temperature = ", ".join(map(str, config.start_blocks)), config.student_temperature
    drawn = f"\n| tokens | drawn from the logits at temperature {temperature:g} |" if temperature > 0 else ""
    split = f"| split | blocks before {config.split_block} come from the logits head, the others from the code head |"
    flow = "| head | flow: the logits of a token do not see its noise, which the flow map takes to it |"
    return f"""| | |
|---|---|
| starting blocks, so up to {len(config.start_blocks)} steps | {starts} |
{flow if pipeline.head == "flow" else split}{drawn}"""
