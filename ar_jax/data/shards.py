"""The files of a data set in shards: tars, Parquet."""

import re
from pathlib import Path

from ar_jax.data.base import Data, NoSplit, folder_of, split_folders
from ar_jax.data.folder import hidden
from ar_jax.files import cache
from ar_jax.files.places import below, path_of
from ar_jax.machine import distributed

# words in names of files; the first that occur are the test split
HELD_OUT = ({"val", "valid", "validation"}, {"test"})
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST = 2**18  # files that a pattern may stand for


def shard_files(data: Data, suffix: str, part: tuple[int, int] = (0, 1)) -> tuple[list[Path], list[Path]]:
    """Files of `data.split`, and those of all splits, both in the order of their names.

    `data.path` is a folder, or a pattern such as `/ssd/part-{00000..00099}.tar` (files of the training split, which need
    not be seen here unless they are of this part). A folder has train/ and val/ (validation/, test/) in it, or names such as
    `train-00000-of-00014.parquet` and `imagenet1k-validation-00.tar`, or training files only.

    Args:
      suffix: of the files, ".tar".
      part: of the files of the split, which are dealt out: this one, of so many.
    Raises:
      NoSplit, ValueError, FileNotFoundError: there are no such files, or not enough.
    """
    index, count = part
    if RANGE.search(data.path):
        chosen = every = _expanded(data)
        if data.split == "test":
            raise NoSplit(f"data.split is test, but data.path={data.path} is a pattern of training files")
    else:
        folder = folder_of(data)
        both = split_folders(folder, "all")
        every = _found(both, suffix)
        chosen = _found(split_folders(folder, data.split), suffix) if len(both) == 2 else _named(every, data, suffix)
        if not chosen:
            raise ValueError(
                f"data.path={folder}: no files *{suffix} of the split {data.split} in {', '.join(map(str, both))}"
            )
    if len(set(distributed.gathered(_number(chosen)).tolist() if count > 1 else [])) > 1:
        raise ValueError(
            f"data.shards is split, but hosts see different files in data.path={data.path}; share the folder, or give a "
            f"pattern such as {data.path}/part-{{00000..00099}}{suffix}"
        )
    if len(chosen) < count:
        raise ValueError(
            f"data.shards is split, but there are {len(chosen)} files *{suffix} for {count} parts of a batch; write more "
            "and smaller ones, or set data.shards to all"
        )
    mine = chosen[index::count]
    return mine, mine if count > 1 else every


def _expanded(data):
    found = [data.path]
    while RANGE.search(found[0]):
        one, numbers = [], RANGE.search(found[0])
        first, last = (int(number) for number in numbers.groups())
        if not 0 <= last - first < MOST // len(found):
            raise ValueError(
                f"data.path is {data.path!r}; {numbers[0]} must rise, and stand for no more than {MOST} files"
            )
        for text in found:
            for number in range(first, last + 1):
                one.append(RANGE.sub(str(number).zfill(len(numbers[1])), text, count=1))
        found = one
    return [path_of(path).expanduser() for path in found]


def _number(files):
    return int(cache.key(file.name for file in files)[:7], 16)


def _found(folders, suffix):
    return [
        file
        for folder in folders
        for file in sorted(file for file in below(folder) if file.name.endswith(suffix))
        if not any(map(hidden, file.relative_to(folder).parts))
    ]


def _named(files, data, suffix):
    """Those of the split, by words in their names."""
    words = [set(re.split("[^a-z]+", file.name.removesuffix(suffix).lower())) for file in files]
    held_out = next((kind for kind in HELD_OUT if any(kind & each for each in words)), set())
    tests = [bool(each & held_out) for each in words]
    others = [bool(each & set.union(*HELD_OUT)) and not test for each, test in zip(words, tests)]  # a test beside a val
    if data.split == "all":
        return [file for file, other in zip(files, others) if not other]
    if files and data.split == "test" and not (any(tests) and not all(tests)):
        raise NoSplit(
            f"data.split is test, but data.path={data.path} has neither train/ and val/ (or test/) in it nor files of both "
            f"with such names as train-00000{suffix} and val-00000{suffix}"
        )
    if all(tests):  # one split's folder
        return files
    return [file for file, test, other in zip(files, tests, others) if test == (data.split == "test") and not other]
