"""Local data for lm-eval's tasks: where the files of a task are, and a task's configuration that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.evaldata import Row, TaskData, json_lines
from llmkit.evaluator import EvalContext
from llmkit.plugins import get_plugins

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def use_local_data(config: dict[str, Any], context: EvalContext, shots: int) -> dict[str, Any]:
    """The task's configuration, changed to read local files where the user gave any; else as it is.

    `shots` is how many examples the task will show: without any, the split that they come from need not be there.
    Raises ValueError naming the file that is missing.
    """
    name = config["task"]
    given = context.task_data.get(name) or context.task_data.get(f"lm_eval:{name}")
    if given is None and context.data_dir is None:
        return config
    if "class" in config:
        raise ValueError(f"task {name!r} is a Python class of lm-eval that loads its own data: it takes no local files")
    splits = _splits(config)
    evaluated = config.get("test_split") or config.get("validation_split")
    if evaluated is None:
        raise ValueError(f"task {name!r} has no split to evaluate on")
    subject = None
    if given is None:
        assert context.data_dir is not None
        given, subject = _find(config, context.data_dir, evaluated, splits)
    needed = {evaluated} | ({_fewshot_split(config)} if shots else set())
    for split in needed - {None}:
        if split not in given:
            have = ", ".join(given) or "none"
            raise ValueError(f"task {name!r} needs its split {split!r}, and there are files for: {have}")
    return _with_files(config, given, subject)


def _splits(config: Mapping[str, Any]) -> set[str]:
    declared = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    return {split for split in [*declared, _config_split(config)] if split}


def _config_split(config: Mapping[str, Any]) -> str | None:
    fewshot = config.get("fewshot_config")
    return fewshot.get("split") if isinstance(fewshot, dict) else None


def _fewshot_split(config: Mapping[str, Any]) -> str | None:
    """The split that lm-eval takes examples from; None where they stand in the configuration."""
    if split := _config_split(config) or config.get("fewshot_split"):
        return str(split)
    if (config.get("fewshot_config") or {}).get("samples") is not None:
        return None
    return config.get("training_split") or config.get("validation_split") or config.get("test_split")


def _find(
    config: Mapping[str, Any], data_dir: Path, evaluated: str, splits: set[str]
) -> tuple[dict[str, Path], str | None]:
    """Files by split from the first layout that has the split to evaluate on, and the subject they are cut down to."""
    dataset, part = str(config.get("dataset_path") or ""), config.get("dataset_name")
    layouts: list[tuple[str, str | None]] = [(f"{config['task']}/{{split}}", None)]
    for evaluator in get_plugins().all("evaluator"):
        data = getattr(evaluator, "data", None)
        if isinstance(data, TaskData) and data.dataset == dataset:
            layout = data.file.removesuffix(".jsonl")
            if data.config == part:
                layouts.append((layout, None))
            elif data.config == "all" and part is not None:  # one file with a field `subject`
                layouts.append((layout, str(part)))
    if dataset:
        layouts.append((f"{dataset}/{part}/{{split}}" if part else f"{dataset}/{{split}}", None))
    for layout, subject in dict.fromkeys(layouts):
        files = {}
        for split in sorted(splits):
            paths = (data_dir / (layout.format(split=split) + suffix) for suffix in SUFFIXES)
            if (path := next(filter(Path.is_file, paths), None)) is not None:
                files[split] = path
        if evaluated in files:
            return files, subject
    places = " or ".join(dict.fromkeys(f"{layout.format(split=evaluated)}.jsonl" for layout, _ in layouts))
    raise ValueError(
        f"there is no {places} in {data_dir}, where split {evaluated!r} of task {config['task']!r} should be; "
        f"name files with --task-data {config['task']}={evaluated}:FILE"
    )


def _with_files(config: dict[str, Any], files: Mapping[str, Path], subject: str | None) -> dict[str, Any]:
    """The configuration with the data in `files` instead of its own; it declares only the splits that are there."""

    def load(**_: Any) -> Any:
        import datasets

        return datasets.DatasetDict({split: _read(path, subject) for split, path in files.items()})

    changed = {**config, "custom_dataset": load, "dataset_kwargs": None}
    for kind in ("training", "validation", "test", "fewshot"):
        if changed.get(f"{kind}_split") not in files:
            changed[f"{kind}_split"] = None
    if _config_split(config) is not None and _config_split(config) not in files:
        changed["fewshot_config"] = {**config["fewshot_config"], "split": None}
    return changed


def _read(path: Path, subject: str | None) -> Any:
    """A file as a Dataset. Raises ValueError naming it."""
    import datasets
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return datasets.Dataset(pq.read_table(path))
        rows: list[Row] = [row for _, row in json_lines(path)]
        if subject is not None:
            rows = [row for row in rows if row.get("subject") == subject]
        if not rows:
            about = "" if subject is None else f" about {subject}"
            raise ValueError(f"{path} has no documents{about}")
        return datasets.Dataset.from_list(rows)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a table of documents: {str(error).splitlines()[0]}") from error
