"""lm-eval against the server gives the score that it gets from transformers on the same checkpoint."""

from __future__ import annotations

import json
import random

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

NUMBER = {"function": "regex", "regex_pattern": "= (-?[0-9]+)"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Sums, with four answers to choose from, or to be said."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(5)
    rows = []
    for _ in range(40):
        a, b = draw.randint(1, 20), draw.randint(1, 20)
        choices = draw.sample(sorted({a + b, a + b + 1, a + b - 1, a + b + 10}), 4)
        rows.append(
            {
                "question": f"What is {a} + {b}?",
                "choices": [f"{a} + {b} = {choice}." for choice in choices],
                "sums": [str(choice) for choice in choices],
                "answer": choices.index(a + b),
            }
        )
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    chosen = common | {
        "task": "sums_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    said = common | {
        "task": "sums_said",
        "output_type": "generate_until",
        "doc_to_target": "{{sums[answer]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 24},
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "= (-?[0-9]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (chosen, said):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(model, arguments, task, tasks, **options):
    done = lm_eval.simple_evaluate(model, model_args=arguments, tasks=[task], task_manager=tasks, **options)
    return {name: value for name, value in done["results"][task].items() if isinstance(value, float)}


def test_likelihoods(url, tiny, tasks):
    served = scores(
        "local-completions",
        {
            "model": "tiny",
            "base_url": f"{url}/completions",
            "tokenizer": str(tiny),
            "max_length": 1024,
            "batch_size": 8,
        },
        "sums_chosen",
        tasks,
    )
    own = scores("hf", {"pretrained": str(tiny), "dtype": "float32", "device": "cpu"}, "sums_chosen", tasks)
    assert served["acc,none"] == own["acc,none"]
    assert served == pytest.approx(own)


def test_chats(url, tiny, tasks):
    served = scores(
        "local-chat-completions",
        {"model": "tiny", "base_url": f"{url}/chat/completions", "max_length": 1024},
        "sums_said",
        tasks,
        apply_chat_template=True,
    )
    own = scores(
        "hf",
        {"pretrained": str(tiny), "dtype": "float32", "device": "cpu"},
        "sums_said",
        tasks,
        apply_chat_template=True,
    )
    assert served == pytest.approx(own) and served["exact_match,number"] > 0.5
