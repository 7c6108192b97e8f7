import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator


@contextmanager
def atomic_folder(path: Path, accelerator: Accelerator):
    """Yields a temporary folder beside `path`, which takes the name `path` when the block ends without an error."""
    temporary = path.with_name(path.name + ".incomplete")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield temporary
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder of checkpoint `name`, or the newest complete one of `output_dir` for "latest"."""
    if name != "latest":
        if not (Path(name) / "state").is_dir():
            raise ValueError(f'`resume_from_checkpoint` "{name}" is no folder checkpoint-<step> with a state/ inside.')
        return Path(name)
    found = {int(path.name.rpartition("-")[2]): path for path in output_dir.glob("checkpoint-*") if not path.suffix}
    if not found:
        raise ValueError(f'There is no checkpoint in "{output_dir}" to resume from: start without it first.')
    return found[max(found)]
