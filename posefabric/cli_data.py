"""The `posefabric data` commands: look at, convert or make data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from posefabric.cli_output import counter, say

data_app = App(name="data", help="Look at, convert or make data sets.")


@data_app.command
def check(
    path: Path,
    /,
    *,
    skeleton: str | None = None,
    images: Path | None = None,
    out: Annotated[Path | None, Parameter(help="where to write the contact sheets")] = None,
) -> None:
    """Read a data set and say what is wrong with it; draw a contact sheet of each split.

    Parameters
    ----------
    path
        A folder with COCO-format annotations, or one such file.
    skeleton
        A shipped name or a YAML file; by default the one whose keypoints the file has.
    images
        The pictures' folder, when it cannot be told from the annotation file's name.
    """
    from posefabric.data.check_run import check_folder

    ok = check_folder(path, skeleton=skeleton, images=images, out=out, say=say)
    if not ok:
        raise SystemExit(1)


@data_app.command
def convert(
    kind: Literal["lsp"], source: Path, /, *, out: Path | None = None, ids: Path | None = None
) -> None:
    """Make COCO-format person crops from the public LSP or LSP-extended folder.

    Parameters
    ----------
    source
        The folder with joints.mat and the images.
    out
        Where to write; by default the folder coco inside the source.
    ids
        A .txt list of picture numbers named after its split, or a folder of such lists; by
        default the shipped splits.
    """
    from posefabric.data.lsp import convert_lsp, ids_by_split

    del kind
    chosen = None if ids is None else ids_by_split(ids)
    target = out or source / "coco"
    counts = convert_lsp(source, target, ids=chosen, progress=counter("pictures"))
    for split, count in counts.items():
        say(f"{split}: " + ", ".join(f"{key} {value}" for key, value in count.items()))
    say(f"written: {target}")


@data_app.command
def shard(
    source: Path,
    out: Path,
    /,
    *overrides: str,
    config: str | None = None,
    per_shard: int = 1000,
    seed: int = 0,
) -> None:
    """Write the pictures as WebDataset shards, for data.format=shards data.root=OUT.

    Parameters
    ----------
    source
        A data set's folder, as for data.root.
    overrides
        Options of the section data where the layout is not the default one, such as
        data.format=mpii data.train_annotations=train.json.
    config
        A shipped name or a YAML file with those options.
    per_shard
        Pictures a shard.
    seed
        Of the order in which training pictures are spread over the shards.
    """
    from posefabric.config import load_config
    from posefabric.data.write_shards import write_shards

    data = load_config(config, overrides).data
    data.root = str(source)
    done = write_shards(data, out, per_shard=per_shard, seed=seed, progress=counter("pictures"))
    for split, counts in done.items():
        say(f"{split}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    say(f"written: {out}; read it with data.format=shards data.root={out}")


@data_app.command
def synthetic(
    out: Path, /, *, skeleton: str = "coco17", train: int = 200, val: int = 50, seed: int = 0
) -> None:
    """Write synthetic people (or animals) as a COCO-format data set."""
    from posefabric.data.synthetic import synthetic_people, write_coco
    from posefabric.skeletons import load_skeleton

    loaded = load_skeleton(skeleton)
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        people = synthetic_people(count=count, seed=3 * seed + number, skeleton=loaded)
        say(f"written: {write_coco(people, out, split)}")


@data_app.command
def parts(
    config: str,
    /,
    *overrides: str,
    count: Annotated[int | None, Parameter(help="number of parts; none: by eigengap")] = None,
    errors: Annotated[Path | None, Parameter(help="a trained run, whose errors to group")] = None,
    out: Annotated[Path | None, Parameter(help="where to write parts.json and parts.png")] = None,
) -> None:
    """Group keypoints by how much they tell about each other, as model.parts=learned does.

    Parameters
    ----------
    config
        A shipped name or a YAML file; its training persons are looked at.
    """
    from posefabric.config import load_config
    from posefabric.data.pipeline import open_dataset
    from posefabric.deploy.part_figure import write_parts
    from posefabric.evaluate.groups import learn_parts, sample_persons

    settings = load_config(config, overrides)
    dataset = sample_persons(open_dataset(settings.data, "train", evaluating=True))
    predictions = None
    if errors is not None:
        from posefabric.deploy.run_report import predict, shipped_network
        from posefabric.run import RunFolder

        run = RunFolder.open(errors).resolve("auto")
        predictions = predict(shipped_network(run), run.config, dataset)
    learned = learn_parts(dataset, count, predictions=predictions)
    say(f"{len(learned.parts)} parts, from the {learned.source} of {learned.persons} persons:")
    for name, members in learned.parts.items():
        say(f"  {name}: [{', '.join(members)}]")
    if out is not None:
        for path in write_parts(learned, dataset, out):
            say(f"written: {path}")
